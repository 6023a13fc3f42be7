/* The server of a device: its queues from start to stop, its pauses, and the disk that it serves. */
#include <signal.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "ublk/internal.h"

#define WORKERS_MAX 64u

static struct ublk_served served_of(tapfs_disk *disk, bool writable)
{
    const struct layer *top = disk_layer(disk, 0);
    return (struct ublk_served){
        .disk = disk,
        .size = top == NULL ? 0 : top->geometry.virtual_size,
        .writable = writable && top != NULL && top->geometry.writable,
    };
}

static bool valid(const tapfs_ublk_options *options)
{
    return options->queues > 0 && options->queues <= QUEUES_MAX && options->depth > 0 && options->depth <= DEPTH_MAX &&
           options->max_bytes > 0 && options->max_bytes <= MOVE_BYTES_MAX && options->workers > 0 &&
           options->workers <= WORKERS_MAX;
}

static int prepare(struct ublk_queue *queue, tapfs_ublk *server, uint32_t number)
{
    const tapfs_ublk_options *options = &server->options;

    queue->server = server;
    queue->number = number;
    queue->rings.fd = -1;
    queue->served = server->served;
    pthread_mutex_init(&queue->returned_lock, NULL);
    queue->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    queue->requests = calloc(options->depth, sizeof *queue->requests);
    queue->mover = mover_new(server->served.disk, options->depth, options->workers,
                             options->io_uring != 0 ? RING_ALL : RING_NONE);
    if (queue->wake_fd < 0 || queue->requests == NULL || queue->mover == NULL) {
        return errno;
    }
    for (uint32_t tag = 0; tag < options->depth; tag++) {
        queue->requests[tag].queue = queue;
        queue->requests[tag].tag = (uint16_t)tag;
    }
    return 0;
}

static void release(struct ublk_queue *queue)
{
    if (queue->server == NULL) {
        return; /* it was never prepared */
    }
    if (queue->mover != NULL) {
        mover_free(queue->mover);
    }
    if (queue->wake_fd >= 0) {
        close(queue->wake_fd);
    }
    free(queue->requests);
    pthread_mutex_destroy(&queue->returned_lock);
}

tapfs_ublk *tapfs_ublk_new(tapfs_disk *disk, const tapfs_ublk_options *options)
{
    if (!valid(options)) {
        errno = EINVAL;
        return NULL;
    }
    tapfs_ublk *server = calloc(1, sizeof *server);
    if (server == NULL) {
        return NULL;
    }
    server->options = *options;
    server->channel = options->simulated >= 0 ? &ublk_simulated : &ublk_driver;
    server->served = served_of(disk, options->writable != 0);
    rate_limit_init(&server->limit);
    park_init(&server->park);
    pthread_mutex_init(&server->lock, NULL);
    pthread_cond_init(&server->settled, NULL);
    server->ended_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    server->queues = calloc(options->queues, sizeof *server->queues);
    int error = server->ended_fd < 0 || server->queues == NULL ? errno : 0;
    for (uint32_t i = 0; i < options->queues && error == 0; i++) {
        error = prepare(&server->queues[i], server, i);
    }
    if (error != 0) {
        tapfs_ublk_free(server);
        errno = error;
        return NULL;
    }
    return server;
}

static void wake_all(const tapfs_ublk *server)
{
    for (uint32_t i = 0; i < server->options.queues; i++) {
        ublk_wake(&server->queues[i]);
    }
}

static void join_all(tapfs_ublk *server)
{
    pthread_mutex_lock(&server->lock);
    atomic_store(&server->stopping, true);
    pthread_cond_broadcast(&server->settled);
    pthread_mutex_unlock(&server->lock);
    wake_all(server);
    for (uint32_t i = 0; i < server->options.queues; i++) {
        if (server->queues[i].started) {
            pthread_join(server->queues[i].thread, NULL);
            server->queues[i].started = false;
        }
    }
}

static int start_queues(tapfs_ublk *server)
{
    int error = 0;

    for (uint32_t i = 0; i < server->options.queues && error == 0; i++) {
        error = pthread_create(&server->queues[i].thread, NULL, ublk_queue_serve, &server->queues[i]);
        server->queues[i].started = error == 0;
    }
    pthread_mutex_lock(&server->lock);
    for (uint32_t i = 0; i < server->options.queues && error == 0; i++) {
        while (!server->queues[i].opened) {
            pthread_cond_wait(&server->settled, &server->lock);
        }
        error = server->queues[i].error;
    }
    server->fetching = error == 0;
    pthread_cond_broadcast(&server->settled);
    for (uint32_t i = 0; i < server->options.queues && error == 0; i++) {
        while (!server->queues[i].ready) {
            pthread_cond_wait(&server->settled, &server->lock);
        }
        error = server->queues[i].error;
    }
    pthread_mutex_unlock(&server->lock);
    return error;
}

int tapfs_ublk_start(tapfs_ublk *server)
{
    sigset_t blocked, previous;

    if (server->started) {
        return -EINVAL;
    }
    server->started = true;
    /* The process's signals are for its other threads. */
    sigfillset(&blocked);
    pthread_sigmask(SIG_SETMASK, &blocked, &previous);
    int error = start_queues(server);
    pthread_sigmask(SIG_SETMASK, &previous, NULL);
    if (error != 0) {
        join_all(server);
    }
    return -error;
}

int tapfs_ublk_ended_fd(tapfs_ublk *server)
{
    return server->ended_fd;
}

int tapfs_ublk_problem(tapfs_ublk *server)
{
    return atomic_load(&server->problem);
}

/* Whether every queue that runs is as it is wanted; under the lock. */
static bool all_quiet(const tapfs_ublk *server)
{
    for (uint32_t i = 0; i < server->options.queues; i++) {
        if (server->queues[i].started && !server->queues[i].quiet) {
            return false;
        }
    }
    return true;
}

static bool all_served(const tapfs_ublk *server)
{
    for (uint32_t i = 0; i < server->options.queues; i++) {
        const struct ublk_queue *queue = &server->queues[i];
        /* A queue whose device is no more takes nothing over, and uses no disk. */
        bool runs = queue->started && !queue->over;
        if (runs && queue->generation != atomic_load(&server->generation)) {
            return false;
        }
    }
    return true;
}

void tapfs_ublk_pause(tapfs_ublk *server)
{
    pthread_mutex_lock(&server->lock);
    atomic_store(&server->paused, true);
    wake_all(server);
    while (!all_quiet(server)) {
        pthread_cond_wait(&server->settled, &server->lock);
    }
    pthread_mutex_unlock(&server->lock);
}

void tapfs_ublk_set_disk(tapfs_ublk *server, tapfs_disk *disk, int writable)
{
    pthread_mutex_lock(&server->lock);
    server->served = served_of(disk, writable != 0);
    atomic_fetch_add(&server->generation, 1);
    wake_all(server);
    /* The old disk may be closed as soon as this returns. */
    while (!all_served(server)) {
        pthread_cond_wait(&server->settled, &server->lock);
    }
    pthread_mutex_unlock(&server->lock);
}

void tapfs_ublk_unpause(tapfs_ublk *server)
{
    pthread_mutex_lock(&server->lock);
    for (uint32_t i = 0; i < server->options.queues; i++) {
        server->queues[i].quiet = server->queues[i].over;
    }
    atomic_store(&server->paused, false);
    pthread_mutex_unlock(&server->lock);
    wake_all(server);
}

void tapfs_ublk_limit(tapfs_ublk *server, uint64_t bytes, uint64_t requests)
{
    rate_limit_set(&server->limit, bytes, requests);
    wake_all(server);
}

void tapfs_ublk_stop(tapfs_ublk *server)
{
    if (server->stopped) {
        return;
    }
    server->stopped = true;
    if (server->started) {
        tapfs_ublk_pause(server);
        join_all(server);
    }
    ublk_park_stop(server);
}

void tapfs_ublk_free(tapfs_ublk *server)
{
    if (server == NULL) {
        return;
    }
    tapfs_ublk_stop(server);
    for (uint32_t i = 0; server->queues != NULL && i < server->options.queues; i++) {
        release(&server->queues[i]);
    }
    free(server->queues);
    if (server->ended_fd >= 0) {
        close(server->ended_fd);
    }
    pthread_cond_destroy(&server->settled);
    pthread_mutex_destroy(&server->lock);
    park_destroy(&server->park);
    rate_limit_destroy(&server->limit);
    free(server);
}

static uint64_t value(const _Atomic uint64_t *counter)
{
    return atomic_load_explicit(counter, memory_order_relaxed);
}

const tapfs_metrics *tapfs_ublk_metrics(const tapfs_ublk *server)
{
    return &server->metrics;
}

void tapfs_ublk_counters(tapfs_ublk *server, tapfs_ublk_statistics *statistics)
{
    *statistics = (tapfs_ublk_statistics){.reads = 0};
    for (uint32_t i = 0; i < server->options.queues; i++) {
        const struct ublk_counters *counters = &server->queues[i].counters;
        statistics->reads += value(&counters->operations[OPERATION_READ]);
        statistics->writes += value(&counters->operations[OPERATION_WRITE]);
        statistics->flushes += value(&counters->operations[OPERATION_FLUSH]);
        statistics->discards += value(&counters->operations[OPERATION_DISCARD]);
        statistics->zeroes += value(&counters->operations[OPERATION_WRITE_ZEROES]);
        statistics->read_bytes += value(&counters->read_bytes);
        statistics->written_bytes += value(&counters->written_bytes);
        statistics->errors += value(&counters->errors);
        statistics->parked += value(&counters->parked);
        statistics->at_once += value(&counters->at_once);
        statistics->passed += value(&counters->passed);
        statistics->batches += value(&counters->batches);
        statistics->throttled_ns += value(&counters->throttled_ns);
        statistics->in_flight += value(&counters->in_flight);
    }
}
