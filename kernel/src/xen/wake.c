/* Calls to a ring's thread or the device's owner from any thread: wake it, give a transfer back, end the device. */
#include <unistd.h>

#include "xen/internal.h"

void xen_ring_wake(struct xen_ring *ring)
{
    uint64_t one = 1;
    ssize_t written = write(ring->wake_fd, &one, sizeof one);
    (void)written; /* full: it is readable already */
}

void xen_ring_return(struct xen_transfer *transfer)
{
    struct xen_ring *ring = transfer->ring;
    pthread_mutex_lock(&ring->returned_lock);
    xen_append(&ring->returned, transfer);
    atomic_store(&ring->has_returned, true);
    pthread_mutex_unlock(&ring->returned_lock);
    xen_ring_wake(ring);
}

void xen_device_ended(tapfs_xen *device, const char *problem)
{
    const char *none = NULL;
    uint64_t one = 1;

    atomic_compare_exchange_strong(&device->problem, &none, problem);
    ssize_t written = write(device->ended_fd, &one, sizeof one);
    (void)written; /* full: it is readable already */
}
