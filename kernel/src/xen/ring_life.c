/* Make and free a ring, from the frontend's pages to its thread. Everything is sized by the ring. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "xen/internal.h"

struct xen_ring *xen_ring_new(tapfs_xen *device, const uint32_t *references, uint32_t count, uint32_t port, int *error)
{
    struct xen_ring *ring = calloc(1, sizeof *ring);

    if (ring == NULL) {
        *error = ENOMEM;
        return NULL;
    }
    ring->device = device;
    ring->port = port;
    ring->page_count = count;
    memcpy(ring->references, references, count * sizeof *references);
    ring->entries = RING_ENTRIES_MAX;
    while (ring->entries * device->layout->entry_bytes > count * XEN_PAGE - RING_ENTRIES_AT) {
        ring->entries /= 2;
    }
    pthread_mutex_init(&ring->returned_lock, NULL);
    ring->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (ring->wake_fd < 0) {
        *error = errno;
        xen_ring_free(ring);
        return NULL;
    }
    *error = xen_map(device->transport, references, count, true, &ring->mapping);
    if (*error != 0) {
        ring->mapping.memory = NULL;
        xen_ring_free(ring);
        return NULL;
    }
    ring->channel = xen_bind(device->transport, port);
    if (ring->channel == NULL) {
        *error = errno;
        xen_ring_free(ring);
        return NULL;
    }
    return ring;
}

static bool allocate(struct xen_ring *ring)
{
    const tapfs_xen_options *options = &ring->device->options;
    size_t entries = ring->entries, segments = (size_t)maximum(options->indirect_segments, DIRECT_SEGMENTS);

    ring->requests = calloc(entries, sizeof *ring->requests);
    ring->segments = calloc(entries * segments, sizeof *ring->segments);
    ring->batch = calloc(entries, sizeof *ring->batch);
    ring->transfers = calloc(entries, sizeof *ring->transfers);
    ring->pieces = calloc(PIECES_MAX, sizeof *ring->pieces);
    ring->owners = calloc(PIECES_MAX, sizeof *ring->owners);
    ring->page_references = calloc(MOVE_PARTS_MAX, sizeof *ring->page_references);
    ring->page_memory = calloc(MOVE_PARTS_MAX, sizeof *ring->page_memory);
    if (options->grants != TAPFS_XEN_COPY) {
        ring->parts = calloc(entries * MOVE_PARTS_MAX, sizeof *ring->parts);
        if (ring->parts == NULL) {
            return false;
        }
    }
    if (options->grants == TAPFS_XEN_PERSISTENT) {
        ring->grants = xen_grants_new(ring->device->transport,
                                      (uint32_t)minimum(entries * segments, PERSISTENT_PAGES_MAX));
        if (ring->grants == NULL) {
            return false;
        }
    }
    return ring->requests != NULL && ring->segments != NULL && ring->batch != NULL && ring->transfers != NULL &&
           ring->pieces != NULL && ring->owners != NULL && ring->page_references != NULL &&
           ring->page_memory != NULL && xen_buffers_init(&ring->buffers, (uint32_t)(entries * segments)) == 0;
}

int xen_ring_prepare(struct xen_ring *ring)
{
    const tapfs_xen_options *options = &ring->device->options;
    size_t segments = (size_t)maximum(options->indirect_segments, DIRECT_SEGMENTS);

    if (!allocate(ring)) {
        return ENOMEM;
    }
    for (uint32_t i = ring->entries; i-- > 0;) {
        ring->requests[i].number = i;
        ring->requests[i].segments = ring->segments + i * segments;
        ring->transfers[i].ring = ring;
        ring->transfers[i].parts = ring->parts == NULL ? NULL : ring->parts + (size_t)i * MOVE_PARTS_MAX;
        ring->transfers[i].next = ring->idle_transfers;
        ring->idle_transfers = &ring->transfers[i];
    }
    ring->served = ring->device->served;
    ring->generation = atomic_load(&ring->device->generation);
    ring->mover = mover_new(ring->served.disk, ring->entries, options->workers,
                            options->io_uring != 0 ? RING_ALL : RING_NONE);
    if (ring->mover == NULL) {
        return errno;
    }
    /* The first buffers are the ones in use; the rest of them is for bursts, and need not be pinned. */
    mover_offer_memory(ring->mover, ring->buffers.memory,
                       (size_t)minimum(ring->buffers.pages, REGISTERED_PAGES_MAX) * XEN_PAGE);
    return 0;
}

int xen_ring_start(struct xen_ring *ring)
{
    int error = pthread_create(&ring->thread, NULL, xen_ring_serve, ring);
    ring->started = error == 0;
    return error;
}

void xen_ring_free(struct xen_ring *ring)
{
    if (ring->mover != NULL) {
        mover_free(ring->mover);
    }
    if (ring->grants != NULL) {
        xen_grants_free(ring->grants);
    }
    if (ring->channel != NULL) {
        xen_unbind(ring->channel);
    }
    if (ring->mapping.memory != NULL) {
        xen_unmap(ring->device->transport, &ring->mapping);
    }
    if (ring->wake_fd >= 0) {
        close(ring->wake_fd);
    }
    xen_buffers_destroy(&ring->buffers);
    free(ring->requests);
    free(ring->segments);
    free(ring->batch);
    free(ring->transfers);
    free(ring->parts);
    free(ring->pieces);
    free(ring->owners);
    free(ring->page_references);
    free(ring->page_memory);
    pthread_mutex_destroy(&ring->returned_lock);
    free(ring);
}
