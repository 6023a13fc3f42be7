/* A device: its disk, its rings, and its end. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "vhost/internal.h"

tapfs_vhost *tapfs_vhost_new(tapfs_disk *disk, uint64_t size, int writable, const char *id)
{
    tapfs_vhost *device = calloc(1, sizeof *device);
    if (device == NULL) {
        return NULL;
    }
    device->problem_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (device->problem_fd < 0) {
        free(device);
        return NULL;
    }
    memcpy(device->id, id, strnlen(id, sizeof device->id));
    park_init(&device->park);
    rate_limit_init(&device->limit);
    tapfs_vhost_set_disk(device, disk, size, writable);
    return device;
}

void tapfs_vhost_set_disk(tapfs_vhost *device, tapfs_disk *disk, uint64_t size, int writable)
{
    device->disk = disk;
    device->size = size;
    device->writable = writable != 0;
}

static struct vhost_queue *queue_at(const tapfs_vhost *device, uint32_t index)
{
    return index < TAPFS_VHOST_RINGS_MAX ? device->queues[index] : NULL;
}

int tapfs_vhost_start_ring(tapfs_vhost *device, uint32_t index, const tapfs_vhost_ring *ring)
{
    int error;

    if (index >= TAPFS_VHOST_RINGS_MAX || device->queues[index] != NULL) {
        return -EINVAL;
    }
    device->queues[index] = vhost_queue_new(device, index, ring, &error);
    return device->queues[index] != NULL ? 0 : -error;
}

int tapfs_vhost_set_call(tapfs_vhost *device, uint32_t index, int call)
{
    struct vhost_queue *queue = queue_at(device, index);
    return queue == NULL ? 0 : -vhost_queue_set_call(queue, call);
}

int64_t tapfs_vhost_stop_ring(tapfs_vhost *device, uint32_t index, int drains)
{
    struct vhost_queue *queue = queue_at(device, index);
    if (queue == NULL) {
        return -ENOENT;
    }
    device->queues[index] = NULL;
    return vhost_queue_end(queue, drains != 0);
}

void tapfs_vhost_limit(tapfs_vhost *device, uint64_t bytes, uint64_t requests)
{
    rate_limit_set(&device->limit, bytes, requests);
    for (uint32_t i = 0; i < TAPFS_VHOST_RINGS_MAX; i++) {
        if (device->queues[i] != NULL) {
            eventfd_write(device->queues[i]->wake_fd, 1);
        }
    }
}

int tapfs_vhost_problem_fd(tapfs_vhost *device)
{
    return device->problem_fd;
}

const char *tapfs_vhost_problem(tapfs_vhost *device, uint32_t index)
{
    return index < TAPFS_VHOST_RINGS_MAX ? atomic_load(&device->problems[index]) : NULL;
}

void tapfs_vhost_stop(tapfs_vhost *device)
{
    if (!device->stopped) {
        device->stopped = true;
        /* No ring is started, so nothing is parked. */
        park_stop(&device->park);
    }
}

void tapfs_vhost_free(tapfs_vhost *device)
{
    if (device == NULL) {
        return;
    }
    for (uint32_t i = 0; i < TAPFS_VHOST_RINGS_MAX; i++) {
        tapfs_vhost_stop_ring(device, i, 0);
    }
    tapfs_vhost_stop(device);
    tapfs_vhost_set_inflight(device, -1, 0, 0, 0, 0);
    tapfs_vhost_set_log(device, -1, 0, 0);
    tapfs_vhost_remove_regions(device);
    park_destroy(&device->park);
    rate_limit_destroy(&device->limit);
    close(device->problem_fd);
    free(device);
}

static uint64_t value(const _Atomic uint64_t *counter)
{
    return atomic_load_explicit(counter, memory_order_relaxed);
}

const tapfs_metrics *tapfs_vhost_metrics(const tapfs_vhost *device)
{
    return &device->metrics;
}

void tapfs_vhost_counters(tapfs_vhost *device, tapfs_vhost_statistics *statistics)
{
    const struct vhost_counters *counters = &device->counters;
    *statistics = (tapfs_vhost_statistics){
        .reads = value(&counters->reads),
        .writes = value(&counters->writes),
        .flushes = value(&counters->flushes),
        .zeroes = value(&counters->zeroes),
        .discards = value(&counters->discards),
        .read_bytes = value(&counters->read_bytes),
        .written_bytes = value(&counters->written_bytes),
        .errors = value(&counters->errors),
        .parked = value(&counters->parked),
        .waited = value(&counters->waited),
        .notifications = value(&counters->notifications),
        .kicks = value(&counters->kicks),
        .redone = value(&counters->redone),
        .throttled_ns = value(&counters->throttled_ns),
    };
}
