/* Transfers that wait for the owner's threads: for a map, a reservation, or the host's disk. */
#include <errno.h>

#include "xen/internal.h"

void xen_park_init(struct xen_park *park)
{
    pthread_mutex_init(&park->mutex, NULL);
    pthread_cond_init(&park->queues[0].filled, NULL);
    pthread_cond_init(&park->queues[1].filled, NULL);
}

void xen_park_destroy(struct xen_park *park)
{
    pthread_cond_destroy(&park->queues[1].filled);
    pthread_cond_destroy(&park->queues[0].filled);
    pthread_mutex_destroy(&park->mutex);
}

static bool moves_data(const struct xen_transfer *transfer)
{
    return transfer->kind == TAPFS_XEN_READ || transfer->kind == TAPFS_XEN_WRITE;
}

void xen_park(struct xen_transfer *transfer)
{
    struct xen_park *park = &transfer->ring->device->park;
    struct xen_queue *queue = &park->queues[moves_data(transfer) ? TAPFS_XEN_MOVES : TAPFS_XEN_OTHERS];

    xen_count(&transfer->ring->counters.parked, 1);
    transfer->disk = transfer->ring->served.disk;
    transfer->error = 0;
    pthread_mutex_lock(&park->mutex);
    xen_append(&queue->waiting, transfer);
    pthread_cond_signal(&queue->filled);
    pthread_mutex_unlock(&park->mutex);
}

void xen_park_stop(struct xen_park *park)
{
    pthread_mutex_lock(&park->mutex);
    park->stopped = true;
    pthread_cond_broadcast(&park->queues[0].filled);
    pthread_cond_broadcast(&park->queues[1].filled);
    pthread_mutex_unlock(&park->mutex);
}

static void describe(const struct xen_transfer *transfer, tapfs_xen_parked *parked)
{
    *parked = (tapfs_xen_parked){
        .ticket = transfer->ticket,
        .offset = transfer->offset,
        .length = transfer->length,
        .request = transfer->kind,
    };
    if (moves_data(transfer)) {
        uint64_t done = transfer->move.outcome.done;
        parked->offset = transfer->move.offset + done;
        parked->length = transfer->move.length - done;
        parked->outcome = transfer->move.outcome;
        if (transfer->kind == TAPFS_XEN_WRITE) {
            parked->data = (const uint8_t *)transfer->move.parts->iov_base + done;
        }
    }
}

int tapfs_xen_next_parked(tapfs_xen *device, uint32_t number, tapfs_xen_parked *parked)
{
    struct xen_park *park = &device->park;
    struct xen_queue *queue = &park->queues[number == TAPFS_XEN_MOVES ? TAPFS_XEN_MOVES : TAPFS_XEN_OTHERS];

    pthread_mutex_lock(&park->mutex);
    while (queue->waiting.first == NULL && !park->stopped) {
        pthread_cond_wait(&queue->filled, &park->mutex);
    }
    struct xen_transfer *transfer = xen_pop(&queue->waiting);
    if (transfer != NULL) {
        transfer->next = park->taken;
        park->taken = transfer;
        transfer->ticket = ++park->last_ticket;
        describe(transfer, parked);
    }
    pthread_mutex_unlock(&park->mutex);
    return transfer != NULL;
}

/* A transfer that somebody has taken, and takes off the list with `remove`. */
static struct xen_transfer *taken_transfer(struct xen_park *park, uint64_t ticket, bool remove)
{
    pthread_mutex_lock(&park->mutex);
    struct xen_transfer **link = &park->taken;
    while (*link != NULL && (*link)->ticket != ticket) {
        link = &(*link)->next;
    }
    struct xen_transfer *transfer = *link;
    if (transfer != NULL && remove) {
        *link = transfer->next;
    }
    pthread_mutex_unlock(&park->mutex);
    return transfer;
}

int tapfs_xen_resume_parked(tapfs_xen *device, uint64_t ticket, tapfs_xen_parked *parked)
{
    /* Whoever took it is the only one who touches it. */
    struct xen_transfer *transfer = taken_transfer(&device->park, ticket, false);
    if (transfer == NULL || !moves_data(transfer)) {
        return 0;
    }
    move_now(transfer->disk, &transfer->move);
    if (transfer->move.outcome.status != TAPFS_DONE) {
        describe(transfer, parked);
        return 1;
    }
    taken_transfer(&device->park, ticket, true);
    xen_ring_return(transfer);
    return 0;
}

void tapfs_xen_complete(tapfs_xen *device, uint64_t ticket, int error)
{
    struct xen_transfer *transfer = taken_transfer(&device->park, ticket, true);
    if (transfer == NULL) {
        return;
    }
    /* A READ that is not moved to its end has nothing to be answered with. */
    transfer->error = error == 0 && transfer->kind == TAPFS_XEN_READ ? EIO : error;
    xen_ring_return(transfer);
}
