/* Make and end the thread of a virtqueue, with all that belongs to it. Everything is sized by the ring. */
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "vhost/internal.h"

/* Threads for moves that io_uring does not do. */
#define WORKERS 8u

static int copy_of(int fd)
{
    return fd < 0 ? -1 : fcntl(fd, F_DUPFD_CLOEXEC, 0);
}

static void close_if_open(int fd)
{
    if (fd >= 0) {
        close(fd);
    }
}

static void free_queue(struct vhost_queue *queue)
{
    if (queue->mover != NULL) {
        mover_free(queue->mover);
    }
    for (uint32_t i = 0; queue->requests != NULL && i < queue->vring.entries; i++) {
        free(queue->requests[i].parts);
    }
    free(queue->requests);
    free(queue->batch);
    free(queue->left);
    free(queue->table);
    free(queue->readable);
    free(queue->writable);
    close_if_open(queue->epoll_fd);
    close_if_open(queue->wake_fd);
    close_if_open(queue->kick_fd);
    close_if_open(queue->call_fd);
    close_if_open(queue->error_fd);
    pthread_mutex_destroy(&queue->call_lock);
    pthread_mutex_destroy(&queue->returned_lock);
    free(queue);
}

static bool allocate(struct vhost_queue *queue)
{
    size_t entries = queue->vring.entries;

    queue->requests = calloc(entries, sizeof *queue->requests);
    queue->batch = calloc(entries, sizeof *queue->batch);
    queue->left = calloc(entries, sizeof *queue->left);
    queue->table = calloc(DESCRIPTORS_MAX, sizeof *queue->table);
    queue->readable = calloc(PARTS_MAX, sizeof *queue->readable);
    queue->writable = calloc(PARTS_MAX, sizeof *queue->writable);
    return queue->requests != NULL && queue->batch != NULL && queue->left != NULL && queue->table != NULL &&
           queue->readable != NULL && queue->writable != NULL;
}

/* Take the ring up where a predecessor left it. */
static int track(struct vhost_queue *queue, uint32_t index)
{
    const tapfs_vhost *device = queue->device;
    uint32_t room = device->inflight_entries;

    if (device->inflight.memory == NULL) {
        return 0;
    }
    if (index >= device->inflight_rings) {
        return EINVAL;
    }
    int error = vhost_track_open(&queue->track, device->inflight.memory + index * vhost_track_bytes(room), room,
                                 queue->vring.entries, queue->vring.published, queue->left, &queue->left_count);
    /* Each request that was taken is answered or marked. */
    queue->vring.taken = (uint16_t)(queue->vring.published + queue->left_count);
    return error;
}

static int watch(const struct vhost_queue *queue, int fd, void *mark, uint32_t events)
{
    struct epoll_event event = {.events = events, .data.ptr = mark};
    return epoll_ctl(queue->epoll_fd, EPOLL_CTL_ADD, fd, &event) < 0 ? errno : 0;
}

static int watch_all(struct vhost_queue *queue)
{
    int error = watch(queue, queue->wake_fd, &queue->wake_fd, EPOLLIN);
    if (error == 0) {
        error = watch(queue, mover_fd(queue->mover), &queue->mover, EPOLLIN);
    }
    if (error == 0) {
        error = watch(queue, queue->kick_fd, &queue->kick_fd, EPOLLIN | EPOLLET);
    }
    return error;
}

static int start_thread(struct vhost_queue *queue)
{
    sigset_t blocked, previous;

    /* The process's signals are for its other threads; a SIGBUS is the thread's own (vhost/guard.c). */
    sigfillset(&blocked);
    sigdelset(&blocked, SIGBUS);
    pthread_sigmask(SIG_SETMASK, &blocked, &previous);
    int error = pthread_create(&queue->thread, NULL, vhost_queue_serve, queue);
    pthread_sigmask(SIG_SETMASK, &previous, NULL);
    return error;
}

static int open_queue(struct vhost_queue *queue, uint32_t index, const tapfs_vhost_ring *ring)
{
    tapfs_vhost *device = queue->device;

    if (!vhost_vring_open(&queue->vring, &device->memory, ring)) {
        return EINVAL;
    }
    queue->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    queue->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    queue->kick_fd = copy_of(ring->kick);
    queue->call_fd = copy_of(ring->call);
    queue->error_fd = copy_of(ring->error);
    if (queue->epoll_fd < 0 || queue->wake_fd < 0 || queue->kick_fd < 0) {
        return errno;
    }
    if (!allocate(queue)) {
        return ENOMEM;
    }
    int error = track(queue, index);
    if (error != 0) {
        return error;
    }
    queue->mover = mover_new(device->disk, queue->vring.entries, WORKERS, RING_MORTAL);
    if (queue->mover == NULL) {
        return errno;
    }
    error = watch_all(queue);
    return error != 0 ? error : start_thread(queue);
}

struct vhost_queue *vhost_queue_new(tapfs_vhost *device, uint32_t index, const tapfs_vhost_ring *ring, int *error)
{
    struct vhost_queue *queue = calloc(1, sizeof *queue);
    if (queue == NULL) {
        *error = ENOMEM;
        return NULL;
    }
    queue->device = device;
    queue->index = index;
    atomic_store(&device->problems[index], NULL);
    queue->epoll_fd = queue->wake_fd = queue->kick_fd = queue->call_fd = queue->error_fd = -1;
    queue->indirect = ring->indirect != 0;
    queue->write_through = ring->write_through != 0;
    queue->logs = ring->logs != 0 && device->log.memory != NULL;
    queue->logs_ring = ring->logs_ring != 0;
    queue->ring_address = ring->used_in_guest;
    queue->gathering_end = &queue->gathering;
    pthread_mutex_init(&queue->call_lock, NULL);
    pthread_mutex_init(&queue->returned_lock, NULL);
    *error = open_queue(queue, index, ring);
    if (*error != 0) {
        free_queue(queue);
        return NULL;
    }
    return queue;
}

int vhost_queue_set_call(struct vhost_queue *queue, int call)
{
    int fd = copy_of(call);
    if (call >= 0 && fd < 0) {
        return errno;
    }
    pthread_mutex_lock(&queue->call_lock);
    int old = queue->call_fd;
    queue->call_fd = fd;
    pthread_mutex_unlock(&queue->call_lock);
    close_if_open(old);
    return 0;
}

uint16_t vhost_queue_end(struct vhost_queue *queue, bool drains)
{
    queue->drains = drains; /* its thread sees it once it sees that it stops */
    atomic_store(&queue->stopping, true);
    eventfd_write(queue->wake_fd, 1);
    pthread_join(queue->thread, NULL);
    uint16_t taken = queue->vring.taken;
    free_queue(queue);
    return taken;
}
