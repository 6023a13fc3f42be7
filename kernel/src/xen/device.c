/* A device: its rings from start to stop, its pauses, and the disk that it serves. */
#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "xen/internal.h"

#define WORKERS_MAX 64u

static struct xen_served served_of(tapfs_disk *disk, bool writable, bool discard)
{
    const struct layer *top = disk_layer(disk, 0);
    return (struct xen_served){
        .disk = disk,
        .sectors = top == NULL ? 0 : top->geometry.virtual_size / XEN_SECTOR_BYTES,
        .writable = writable && top != NULL && top->geometry.writable,
        .discard = discard,
    };
}

static bool valid(const tapfs_xen_options *options)
{
    return xen_layout(options->protocol) != NULL && options->grants <= TAPFS_XEN_PERSISTENT &&
           options->indirect_segments <= INDIRECT_SEGMENTS_MAX && options->workers > 0 &&
           options->workers <= WORKERS_MAX;
}

tapfs_xen *tapfs_xen_new(tapfs_disk *disk, const tapfs_xen_options *options)
{
    if (!valid(options)) {
        errno = EINVAL;
        return NULL;
    }
    tapfs_xen *device = calloc(1, sizeof *device);
    if (device == NULL) {
        return NULL;
    }
    device->options = *options;
    device->options.machine = NULL; /* not ours to keep */
    device->layout = xen_layout(options->protocol);
    device->served = served_of(disk, options->writable != 0, options->discard != 0);
    device->ended_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (device->ended_fd < 0) {
        free(device);
        return NULL;
    }
    device->transport = xen_transport_open(options->machine, options->domain);
    if (device->transport == NULL) {
        int error = errno;
        close(device->ended_fd);
        free(device);
        errno = error;
        return NULL;
    }
    rate_limit_init(&device->limit);
    park_init(&device->park);
    pthread_mutex_init(&device->lock, NULL);
    pthread_cond_init(&device->settled, NULL);
    return device;
}

int tapfs_xen_add_ring(tapfs_xen *device, const uint32_t *references, uint32_t count, uint32_t port)
{
    int error;

    if (count == 0 || count > RING_PAGES_MAX || (count & (count - 1)) != 0 || device->ring_count == RINGS_MAX ||
        device->started) {
        return -EINVAL;
    }
    struct xen_ring *ring = xen_ring_new(device, references, count, port, &error);
    if (ring == NULL) {
        return -error;
    }
    device->rings[device->ring_count++] = ring;
    return 0;
}

static void join_rings(tapfs_xen *device)
{
    for (uint32_t i = 0; i < device->ring_count; i++) {
        if (device->rings[i]->started) {
            pthread_join(device->rings[i]->thread, NULL);
            device->rings[i]->started = false;
        }
    }
}

static int start_rings(tapfs_xen *device)
{
    int error = xen_journal_open(device);
    for (uint32_t i = 0; i < device->ring_count && error == 0; i++) {
        error = xen_ring_prepare(device->rings[i]);
    }
    /* The threads wait for the lock: none takes a request before all are there. */
    pthread_mutex_lock(&device->lock);
    for (uint32_t i = 0; i < device->ring_count && error == 0; i++) {
        error = xen_ring_start(device->rings[i]);
    }
    atomic_store(&device->stopping, error != 0);
    pthread_mutex_unlock(&device->lock);
    if (error != 0) {
        join_rings(device);
    }
    return error;
}

int tapfs_xen_start(tapfs_xen *device)
{
    sigset_t blocked, previous;

    if (device->ring_count == 0 || device->started) {
        return -EINVAL;
    }
    device->started = true;
    /* The process's signals are for its other threads. */
    sigfillset(&blocked);
    pthread_sigmask(SIG_SETMASK, &blocked, &previous);
    int error = start_rings(device);
    pthread_sigmask(SIG_SETMASK, &previous, NULL);
    return -error;
}

int tapfs_xen_ended_fd(tapfs_xen *device)
{
    return device->ended_fd;
}

const char *tapfs_xen_problem(tapfs_xen *device)
{
    return atomic_load(&device->problem);
}

static void wake_rings(tapfs_xen *device)
{
    for (uint32_t i = 0; i < device->ring_count; i++) {
        xen_ring_wake(device->rings[i]);
    }
}

/* Whether every ring that runs is as it is wanted; under the lock. */
static bool all_quiet(const tapfs_xen *device)
{
    for (uint32_t i = 0; i < device->ring_count; i++) {
        if (device->rings[i]->started && !device->rings[i]->quiet) {
            return false;
        }
    }
    return true;
}

static bool all_served(const tapfs_xen *device)
{
    for (uint32_t i = 0; i < device->ring_count; i++) {
        if (device->rings[i]->started && device->rings[i]->generation != atomic_load(&device->generation)) {
            return false;
        }
    }
    return true;
}

void tapfs_xen_pause(tapfs_xen *device)
{
    pthread_mutex_lock(&device->lock);
    atomic_store(&device->paused, true);
    wake_rings(device);
    while (!all_quiet(device)) {
        pthread_cond_wait(&device->settled, &device->lock);
    }
    pthread_mutex_unlock(&device->lock);
}

void tapfs_xen_set_disk(tapfs_xen *device, tapfs_disk *disk, int writable, int discard)
{
    pthread_mutex_lock(&device->lock);
    device->served = served_of(disk, writable != 0, discard != 0);
    atomic_fetch_add(&device->generation, 1);
    wake_rings(device);
    /* The old disk may be closed as soon as this returns. */
    while (!all_served(device)) {
        pthread_cond_wait(&device->settled, &device->lock);
    }
    pthread_mutex_unlock(&device->lock);
}

void tapfs_xen_unpause(tapfs_xen *device)
{
    pthread_mutex_lock(&device->lock);
    for (uint32_t i = 0; i < device->ring_count; i++) {
        device->rings[i]->quiet = false;
    }
    atomic_store(&device->paused, false);
    pthread_mutex_unlock(&device->lock);
    wake_rings(device);
}

void tapfs_xen_limit(tapfs_xen *device, uint64_t bytes, uint64_t requests)
{
    rate_limit_set(&device->limit, bytes, requests);
    wake_rings(device);
}

void tapfs_xen_stop(tapfs_xen *device)
{
    if (device->stopped) {
        return;
    }
    device->stopped = true;
    tapfs_xen_pause(device);
    atomic_store(&device->stopping, true);
    wake_rings(device);
    join_rings(device);
    xen_park_stop(&device->park);
}

void tapfs_xen_free(tapfs_xen *device)
{
    if (device == NULL) {
        return;
    }
    tapfs_xen_stop(device);
    xen_journal_close(device);
    for (uint32_t i = 0; i < device->ring_count; i++) {
        xen_ring_free(device->rings[i]);
    }
    xen_transport_close(device->transport);
    close(device->ended_fd);
    pthread_cond_destroy(&device->settled);
    pthread_mutex_destroy(&device->lock);
    park_destroy(&device->park);
    rate_limit_destroy(&device->limit);
    free(device);
}

static uint64_t value(const _Atomic uint64_t *counter)
{
    return atomic_load_explicit(counter, memory_order_relaxed);
}

const tapfs_metrics *tapfs_xen_metrics(const tapfs_xen *device)
{
    return &device->metrics;
}

void tapfs_xen_counters(tapfs_xen *device, tapfs_xen_statistics *statistics)
{
    *statistics = (tapfs_xen_statistics){.reads = 0};
    for (uint32_t i = 0; i < device->ring_count; i++) {
        const struct xen_counters *counters = &device->rings[i]->counters;
        statistics->reads += value(&counters->operations[OPERATION_READ]);
        statistics->writes += value(&counters->operations[OPERATION_WRITE]);
        statistics->barriers += value(&counters->operations[OPERATION_BARRIER]);
        statistics->flushes += value(&counters->operations[OPERATION_FLUSH]);
        statistics->discards += value(&counters->operations[OPERATION_DISCARD]);
        statistics->read_bytes += value(&counters->read_bytes);
        statistics->written_bytes += value(&counters->written_bytes);
        statistics->errors += value(&counters->errors);
        statistics->merged += value(&counters->merged);
        statistics->parked += value(&counters->parked);
        statistics->at_once += value(&counters->at_once);
        statistics->borrowed += value(&counters->borrowed);
        statistics->notifications += value(&counters->notifications);
        statistics->batches += value(&counters->batches);
        statistics->throttled_ns += value(&counters->throttled_ns);
        statistics->in_flight += value(&counters->in_flight);
    }
}
