/* The server: its threads, from start to stop. */
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#include "fuse/internal.h"

/* Interrupts a read that waits for the kernel. A stray one does nothing: it is ignored by default. */
#define WAKE_SIGNAL SIGURG

static void close_if_open(int fd)
{
    if (fd >= 0) {
        close(fd);
    }
}

tapfs_fuse *tapfs_fuse_new(int fuse_fd, int session_fd, tapfs_disk *disk)
{
    tapfs_fuse *server = calloc(1, sizeof *server);
    if (server == NULL) {
        return NULL;
    }
    server->ended_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    server->moves.wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (server->ended_fd < 0 || server->moves.wake_fd < 0) {
        int error = errno;
        close_if_open(server->ended_fd);
        close_if_open(server->moves.wake_fd);
        free(server);
        errno = error;
        return NULL;
    }
    server->disk = disk;
    server->fuse_fd = fuse_fd;
    server->connections[0] = fuse_fd;
    server->connection_count = 1;
    server->session_fd = session_fd;
    pthread_mutex_init(&server->buffer_lock, NULL);
    pthread_cond_init(&server->buffer_returned, NULL);
    park_init(&server->park);
    pthread_mutex_init(&server->moves.lock, NULL);
    pthread_mutex_init(&server->forward_lock, NULL);
    pthread_cond_init(&server->forward_filled, NULL);
    return server;
}

static void interrupt(tapfs_fuse *server, const uint8_t *message, size_t length)
{
    struct fuse_interrupt_in in;
    if (length >= sizeof(struct fuse_in_header) + sizeof in) {
        memcpy(&in, message + sizeof(struct fuse_in_header), sizeof in);
        fuse_interrupt(server, in.unique);
    }
}

static void handle(const struct fuse_thread *thread, struct fuse_buffer **buffer, size_t length)
{
    const uint8_t *message = (*buffer)->memory + BUFFER_MESSAGE_AT;
    struct fuse_in_header header;

    if (length < sizeof header) {
        return; /* nothing that could be answered; the kernel never does this */
    }
    memcpy(&header, message, sizeof header);
    if (header.len != length) {
        fuse_reply(thread->fd, header.unique, EINVAL, NULL, 0);
    } else if (header.opcode == FUSE_INTERRUPT) {
        /* Only what is parked can be interrupted, nothing in pyfuse3, and no answer means just that. */
        interrupt(thread->server, message, length);
    } else if (fuse_data_request(thread, buffer, length)) {
        return;
    } else if (header.opcode == FUSE_LSEEK) {
        /* The session would answer ENOSYS, and the kernel would then seek in no file of the mount any more. */
        fuse_reply(thread->fd, header.unique, EINVAL, NULL, 0);
    } else {
        if (header.opcode == FUSE_INIT) {
            fuse_init_asked(thread->server, message, length);
        }
        fuse_forward(thread, message, length);
    }
}

static void *serve(void *argument)
{
    struct fuse_thread *thread = argument;
    tapfs_fuse *server = thread->server;
    struct fuse_buffer *buffer = NULL;

    while (!atomic_load(&server->stopping)) {
        if (buffer == NULL) {
            buffer = fuse_buffer_take(server);
            if (buffer == NULL) {
                break;
            }
        }
        ssize_t got = read(thread->fd, buffer->memory + BUFFER_MESSAGE_AT, MESSAGE_BYTES_MAX);
        if (got > 0) {
            handle(thread, &buffer, (size_t)got);
        } else if (got == 0 || (errno != EINTR && errno != EAGAIN && errno != ENOENT)) {
            break; /* ENODEV: unmounted; ECONNABORTED: aborted */
        }
    }
    if (buffer != NULL) {
        fuse_buffer_return(server, buffer);
    }
    if (atomic_fetch_sub(&server->threads_running, 1) == 1) {
        fuse_signal_ended(server);
    }
    atomic_store(&thread->exited, true);
    return NULL;
}

static void woken(int number)
{
    (void)number;
}

int tapfs_fuse_add_connection(tapfs_fuse *server, int fuse_fd)
{
    if (server->connection_count == THREADS_MAX || server->thread_count != 0) {
        return -EINVAL;
    }
    server->connections[server->connection_count++] = fuse_fd;
    return 0;
}

static void set_up_threads(tapfs_fuse *server, uint32_t count)
{
    server->thread_count = count;
    atomic_store(&server->threads_running, count);
    for (uint32_t i = 0; i < count; i++) {
        server->threads[i].server = server;
        server->threads[i].index = i;
        server->threads[i].fd = i < server->connection_count ? server->connections[i] : server->fuse_fd;
    }
}

static int start_threads(tapfs_fuse *server)
{
    uint32_t count = server->thread_count;
    for (uint32_t i = 0; i < count; i++) {
        int error = pthread_create(&server->threads[i].thread, NULL, serve, &server->threads[i]);
        if (error != 0) {
            return error;
        }
        server->threads[i].started = true;
    }
    return 0;
}

int tapfs_fuse_start(tapfs_fuse *server, uint32_t threads)
{
    struct sigaction action = {.sa_handler = woken};
    sigset_t blocked, previous;

    if (threads == 0 || threads > THREADS_MAX || server->thread_count != 0) {
        return -EINVAL;
    }
    /* Without SA_RESTART: the point is that the read ends. */
    if (sigaction(WAKE_SIGNAL, &action, NULL) != 0) {
        return -errno;
    }
    /* The process's signals are for its other threads. */
    sigfillset(&blocked);
    sigdelset(&blocked, WAKE_SIGNAL);
    pthread_sigmask(SIG_SETMASK, &blocked, &previous);
    int error = fuse_session_start(server);
    if (error == 0) {
        error = fuse_moves_start(server);
    }
    set_up_threads(server, threads);
    if (error == 0 && server->taken_over) {
        fuse_forward_again(server);
    }
    if (error == 0) {
        error = start_threads(server);
    }
    pthread_sigmask(SIG_SETMASK, &previous, NULL);
    return -error;
}

/* A signal that comes right before the read would be lost, so it is sent until the thread has ended. */
static void end_thread(struct fuse_thread *thread)
{
    const struct timespec pause = {.tv_nsec = 500000};
    while (!atomic_load(&thread->exited)) {
        pthread_kill(thread->thread, WAKE_SIGNAL);
        nanosleep(&pause, NULL);
    }
    pthread_join(thread->thread, NULL);
}

void tapfs_fuse_stop(tapfs_fuse *server)
{
    if (server->stopped) {
        return;
    }
    server->stopped = true;
    atomic_store(&server->stopping, true);
    fuse_park_stop(server);
    fuse_moves_close(server);
    fuse_buffers_stop(server);
    for (uint32_t i = 0; i < server->thread_count; i++) {
        if (server->threads[i].started) {
            end_thread(&server->threads[i]);
        }
    }
    fuse_moves_join(server);
    fuse_session_stop(server);
    fuse_note_passthrough(server);
}

void tapfs_fuse_free(tapfs_fuse *server)
{
    if (server == NULL) {
        return;
    }
    tapfs_fuse_stop(server);
    fuse_backing_close(server);
    for (uint32_t i = 0; i < server->connection_count; i++) {
        close(server->connections[i]);
    }
    close(server->session_fd);
    close(server->ended_fd);
    close(server->moves.wake_fd);
    fuse_buffers_free(server);
    pthread_cond_destroy(&server->forward_filled);
    pthread_mutex_destroy(&server->forward_lock);
    pthread_mutex_destroy(&server->moves.lock);
    park_destroy(&server->park);
    pthread_cond_destroy(&server->buffer_returned);
    pthread_mutex_destroy(&server->buffer_lock);
    fuse_nodes_free(server);
    free(server);
}

int tapfs_fuse_ended_fd(tapfs_fuse *server)
{
    return server->ended_fd;
}

uint32_t tapfs_fuse_passthrough_nodes(tapfs_fuse *server)
{
    return atomic_load(&server->passthrough_nodes);
}

const tapfs_metrics *tapfs_fuse_metrics(const tapfs_fuse *server)
{
    return &server->metrics;
}

void tapfs_fuse_counters(tapfs_fuse *server, tapfs_fuse_statistics *statistics)
{
    statistics->reads = atomic_load(&server->reads);
    statistics->writes = atomic_load(&server->writes);
    statistics->parked = atomic_load(&server->parked);
    statistics->waited = atomic_load(&server->waited);
    statistics->forwarded = atomic_load(&server->forwarded);
}

uint64_t tapfs_fuse_last_write(tapfs_fuse *server)
{
    return atomic_load(&server->last_write);
}
