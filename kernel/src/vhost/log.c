/*
 * The log of a live migration: a bit for each page of 4096 bytes of the guest's memory that the device has written.
 *
 * The front end keeps the log in memory that it shares, clears the bits that it has seen and sends those pages to the other
 * machine. So a bit is set after its page was written: a page that is sent in between is sent again.
 */
#include <errno.h>

#include "vhost/internal.h"

#define LOG_PAGE_SHIFT 12

/* Pages behind the end of the log are none of the guest's: the front end has made it for all of its memory. */
static void mark(tapfs_vhost *device, uint64_t address, uint64_t length)
{
    uint64_t page = address >> LOG_PAGE_SHIFT, last = (address + length - 1) >> LOG_PAGE_SHIFT;

    for (; page <= last && page / 8 < device->log_bytes; page++) {
        __atomic_fetch_or(&device->log.memory[page / 8], (uint8_t)(1u << page % 8), __ATOMIC_RELEASE);
    }
}

void vhost_log_memory(struct vhost_queue *queue, const void *memory, uint64_t length)
{
    tapfs_vhost *device = queue->device;

    if (!queue->logs || length == 0) {
        return;
    }
    for (uint32_t i = 0; i < device->memory.count; i++) {
        const struct vhost_region *region = &device->memory.regions[i];
        uint64_t inner = (uintptr_t)memory - (uintptr_t)region->memory;
        if ((uintptr_t)memory >= (uintptr_t)region->memory && inner < region->told.size) {
            mark(device, region->told.guest + inner, length);
            return;
        }
    }
}

void vhost_log_read(struct vhost_request *request)
{
    for (uint32_t i = 0; request->kind == TAPFS_VHOST_READ && i < request->move.part_count; i++) {
        vhost_log_memory(request->queue, request->move.parts[i].iov_base, request->move.parts[i].iov_len);
    }
}

void vhost_log_ring(struct vhost_queue *queue)
{
    if (queue->logs && queue->logs_ring) {
        mark(queue->device, queue->ring_address, vhost_vring_used_bytes(&queue->vring));
    }
}

int tapfs_vhost_set_log(tapfs_vhost *device, int fd, uint64_t offset, uint64_t size)
{
    vhost_unmap(&device->log);
    device->log_bytes = 0;
    if (fd < 0) {
        return 0;
    }
    int error = vhost_map(fd, offset, size, &device->log, &device->memory.gone);
    device->log_bytes = error == 0 ? size : 0;
    return -error;
}
