/* Transfers that wait for the owner's threads: for a map, a reservation, or the host's disk. */
#include <errno.h>

#include "xen/internal.h"

static struct xen_transfer *transfer_of(struct parked_entry *entry)
{
    return (struct xen_transfer *)(void *)entry;
}

static bool moves_data(const struct xen_transfer *transfer)
{
    return transfer->kind == TAPFS_XEN_READ || transfer->kind == TAPFS_XEN_WRITE;
}

static void give_back(struct xen_transfer *transfer, int error)
{
    transfer->error = error;
    xen_ring_return(transfer);
}

static uint32_t queue_of(const struct xen_transfer *transfer)
{
    if (transfer->kind == TAPFS_XEN_WRITE && transfer->move.outcome.status == TAPFS_RESERVE) {
        return TAPFS_WRITES;
    }
    if (moves_data(transfer)) {
        return TAPFS_MOVES;
    }
    return transfer->kind == TAPFS_XEN_SYNC ? TAPFS_SYNCS : TAPFS_OTHERS;
}

void xen_park(struct xen_transfer *transfer)
{
    uint32_t queue = queue_of(transfer);

    xen_count(&transfer->ring->counters.parked, 1);
    transfer->disk = transfer->ring->served.disk;
    if (!park_put(&transfer->ring->device->park, queue, &transfer->entry)) {
        give_back(transfer, EIO);
    }
}

void xen_park_stop(struct park *park)
{
    struct parked_entry *left = park_stop(park);

    while (left != NULL) {
        struct xen_transfer *transfer = transfer_of(left);
        left = left->next;
        give_back(transfer, EIO);
    }
}

static void describe(const struct parked_entry *entry, tapfs_parked *parked)
{
    const struct xen_transfer *transfer = (const void *)entry;
    *parked = (tapfs_parked){
        .ticket = entry->ticket,
        .offset = transfer->offset,
        .length = transfer->length,
        .request = transfer->kind,
    };
    if (moves_data(transfer)) {
        uint64_t done = transfer->move.outcome.done;
        parked->offset = transfer->move.offset + done;
        parked->length = transfer->move.length - done;
        parked->outcome = transfer->move.outcome;
        parked->tried = transfer->first->since;
        if (transfer->kind == TAPFS_XEN_WRITE) {
            parked->data = (const uint8_t *)transfer->move.parts->iov_base + done;
        }
    }
}

size_t tapfs_xen_next_parked(tapfs_xen *device, uint32_t queue, tapfs_parked *parked, size_t capacity)
{
    return park_next_described(&device->park, queue, parked, capacity, describe);
}

int tapfs_xen_resume_parked(tapfs_xen *device, uint64_t ticket, tapfs_parked *parked)
{
    /* Nobody but the thread that took it touches it. */
    struct xen_transfer *transfer = transfer_of(park_taken(&device->park, ticket, false));
    if (transfer == NULL || !moves_data(transfer)) {
        return 0;
    }
    move_now(transfer->disk, &transfer->move);
    if (transfer->move.outcome.status != TAPFS_DONE) {
        describe(&transfer->entry, parked);
        return 1;
    }
    park_taken(&device->park, ticket, true);
    give_back(transfer, 0);
    return 0;
}

void tapfs_xen_complete(tapfs_xen *device, uint64_t ticket, int error)
{
    struct xen_transfer *transfer = transfer_of(park_taken(&device->park, ticket, true));
    if (transfer != NULL) {
        /* A READ that is not moved to its end has nothing to be answered with. */
        give_back(transfer, error == 0 && transfer->kind == TAPFS_XEN_READ ? EIO : error);
    }
}
