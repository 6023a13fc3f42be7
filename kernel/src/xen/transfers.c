/*
 * Transfers: requests whose data is moved together. A transfer waits for memory, has the data of a write copied in, and
 * begins its move. After the move its requests are answered, done again one by one, or parked.
 */
#include <errno.h>
#include <string.h>

#include "xen/internal.h"

/* ---- made of requests */

struct xen_transfer *xen_transfer_new(struct xen_ring *ring, uint32_t kind, struct xen_request *request)
{
    /* Each has a request of its own, so there are always enough. */
    struct xen_transfer *transfer = ring->idle_transfers;
    ring->idle_transfers = transfer->next;
    request->next = NULL;
    transfer->next = NULL;
    transfer->first = transfer->last = request;
    transfer->request_count = 1;
    transfer->segment_count = request->segment_count;
    transfer->offset = request->offset;
    transfer->length = request->length;
    transfer->kind = kind;
    transfer->stage = STAGE_ONLY;
    transfer->memory = MEMORY_NONE;
    transfer->by_buffer = false;
    transfer->error = 0;
    return transfer;
}

static bool joins(const struct xen_transfer *transfer, const struct xen_request *request)
{
    return transfer != NULL && transfer->offset + transfer->length == request->offset &&
           transfer->length + request->length <= MOVE_BYTES_MAX &&
           transfer->segment_count + request->segment_count <= MOVE_PARTS_MAX;
}

void xen_move_add(struct xen_ring *ring, struct xen_request *request)
{
    uint32_t kind = request->operation == OPERATION_READ ? TAPFS_XEN_READ : TAPFS_XEN_WRITE;
    struct xen_transfer *open = ring->open[kind];

    if (!joins(open, request)) {
        ring->open[kind] = xen_transfer_new(ring, kind, request);
        xen_append(&ring->waiting, ring->open[kind]);
        return;
    }
    request->next = NULL;
    open->last->next = request;
    open->last = request;
    open->request_count++;
    open->segment_count += request->segment_count;
    open->length += request->length;
    xen_count(&ring->counters.merged, 1);
}

void xen_move_seal(struct xen_ring *ring)
{
    ring->open[TAPFS_XEN_READ] = ring->open[TAPFS_XEN_WRITE] = NULL;
}

/* Its pages are let go of before the responses say that the frontend may have them back. */
static void forget(struct xen_transfer *transfer)
{
    struct xen_ring *ring = transfer->ring;
    xen_pages_release(transfer);
    transfer->next = ring->idle_transfers;
    ring->idle_transfers = transfer;
}

/* Each request with `status`, or with what it has met by itself. */
static void answer(struct xen_transfer *transfer, int16_t status)
{
    struct xen_ring *ring = transfer->ring;

    ring->barrier_answered |= transfer == ring->barrier;
    forget(transfer);
    for (struct xen_request *request = transfer->first; request != NULL;) {
        struct xen_request *next = request->next;
        if (request->status == STATUS_OKAY) {
            request->status = status;
        }
        xen_ring_answer(ring, request);
        request = next;
    }
}

/* Something of it has failed: its requests are done one by one, so that each gets an answer of its own. */
static void split(struct xen_transfer *transfer)
{
    struct xen_ring *ring = transfer->ring;
    struct xen_request *request = transfer->first;
    uint32_t kind = transfer->kind;
    struct xen_transfers singles = {NULL, NULL};

    forget(transfer); /* the first of them gets it back */
    while (request != NULL) {
        struct xen_request *next = request->next;
        if (request->status != STATUS_OKAY) {
            xen_ring_answer(ring, request);
        } else {
            xen_append(&singles, xen_transfer_new(ring, kind, request));
        }
        request = next;
    }
    if (singles.first != NULL) {
        singles.last->next = ring->waiting.first;
        ring->waiting.last = ring->waiting.first != NULL ? ring->waiting.last : singles.last;
        ring->waiting.first = singles.first;
    }
}

static bool has_failed(const struct xen_transfer *transfer)
{
    for (const struct xen_request *request = transfer->first; request != NULL; request = request->next) {
        if (request->status != STATUS_OKAY) {
            return true;
        }
    }
    return false;
}

/* ---- begun */

static void begin(struct xen_transfer *transfer)
{
    struct xen_ring *ring = transfer->ring;

    transfer->move.among_others = ring->begins_many;
    if (mover_begin(ring->mover, &transfer->move)) {
        if (transfer->move.outcome.status == TAPFS_DONE) {
            xen_count(&ring->counters.at_once, transfer->request_count);
        }
        xen_move_ended(&transfer->move);
    }
}

static void fetch_and_begin(struct xen_ring *ring, struct xen_transfers *fetching)
{
    struct xen_transfer *transfer;

    xen_pieces_copy(ring, false);
    while ((transfer = xen_pop(fetching)) != NULL) {
        if (!has_failed(transfer)) {
            begin(transfer);
        } else if (transfer->stage == STAGE_ONLY) {
            split(transfer);
        } else {
            answer(transfer, STATUS_ERROR);
        }
    }
}

/* Begin what is to be written, and what is to be read into memory that is not the host's. */
static void begin_waiting(struct xen_ring *ring)
{
    struct xen_transfers fetching = {NULL, NULL};
    struct xen_transfer *transfer = ring->waiting.first;

    ring->begins_many = transfer != NULL && transfer->next != NULL;
    while ((transfer = ring->waiting.first) != NULL && xen_pages_acquire(transfer)) {
        xen_pop(&ring->waiting);
        if (transfer->memory != MEMORY_BUFFER || transfer->kind == TAPFS_XEN_READ) {
            begin(transfer);
            continue;
        }
        if (!xen_pieces_fit(transfer)) {
            fetch_and_begin(ring, &fetching);
        }
        xen_pieces_add(transfer);
        xen_append(&fetching, transfer);
    }
    fetch_and_begin(ring, &fetching);
    mover_submit(ring->mover);
    xen_move_take_over(ring);
}

/* Copy out of the host's own memory. What fails, for whatever reason, is read into a buffer. */
static void copy_borrowed(struct xen_ring *ring, struct xen_transfers *borrowed)
{
    struct xen_transfer *transfer;

    xen_pieces_copy(ring, true);
    while ((transfer = xen_pop(borrowed)) != NULL) {
        bool failed = has_failed(transfer);
        xen_pages_give_back(transfer, !failed);
        ring->borrowed_failures = failed ? ring->borrowed_failures + 1 : 0;
        if (!failed) {
            xen_count(&ring->counters.at_once, transfer->request_count);
            xen_count(&ring->counters.borrowed, transfer->request_count);
            answer(transfer, STATUS_OKAY);
            continue;
        }
        for (struct xen_request *request = transfer->first; request != NULL; request = request->next) {
            request->status = STATUS_OKAY;
        }
        transfer->by_buffer = true;
        xen_append(&ring->waiting, transfer);
    }
}

/* READs whose bytes the host has in memory that can be copied from. The copies are calls of their own: where a page has
 * gone meanwhile a call fails as a whole. */
static void borrow_waiting(struct xen_ring *ring)
{
    struct xen_transfers borrowed = {NULL, NULL}, waiting = ring->waiting;
    struct xen_transfer *transfer;

    ring->waiting = (struct xen_transfers){NULL, NULL};
    while ((transfer = xen_pop(&waiting)) != NULL) {
        if (!xen_pages_borrow(transfer)) {
            xen_append(&ring->waiting, transfer);
            continue;
        }
        if (!xen_pieces_fit(transfer)) {
            copy_borrowed(ring, &borrowed);
        }
        xen_pieces_add(transfer);
        xen_append(&borrowed, transfer);
    }
    copy_borrowed(ring, &borrowed);
}

/* ---- ended */

void xen_move_ended(struct move *move)
{
    struct xen_transfer *transfer = move->context;
    xen_append(&transfer->ring->ended_moves, transfer);
}

void xen_move_take_over(struct xen_ring *ring)
{
    if (mover_in_flight(ring->mover) == 0) {
        return;
    }
    for (struct move *move = mover_ended(ring->mover), *next; move != NULL; move = next) {
        next = move->next;
        xen_move_ended(move);
    }
}

void xen_move_sync(struct xen_transfer *transfer, enum xen_stage stage)
{
    xen_pages_release(transfer);
    transfer->stage = stage;
    transfer->kind = TAPFS_XEN_SYNC;
    xen_append(&transfer->ring->unsynced, transfer);
}

static void done(struct xen_transfer *transfer)
{
    if (transfer->stage == STAGE_WRITE) {
        xen_move_sync(transfer, STAGE_SYNC_AFTER);
    } else {
        answer(transfer, STATUS_OKAY);
    }
}

static void deliver(struct xen_ring *ring, struct xen_transfers *delivering)
{
    struct xen_transfer *transfer;

    xen_pieces_copy(ring, true);
    while ((transfer = xen_pop(delivering)) != NULL) {
        done(transfer);
    }
}

static void park_move(struct xen_transfer *transfer)
{
    if (transfer->kind == TAPFS_XEN_READ || transfer->memory == MEMORY_BUFFER || xen_pages_gather(transfer)) {
        xen_park(transfer);
    } else {
        xen_append(&transfer->ring->gathering, transfer);
    }
}

static void finish_ended(struct xen_ring *ring)
{
    struct xen_transfers delivering = {NULL, NULL};
    struct xen_transfer *transfer;

    while ((transfer = xen_pop(&ring->ended_moves)) != NULL) {
        int32_t status = transfer->move.outcome.status;
        if (status == TAPFS_FAILED && transfer->request_count > 1) {
            split(transfer);
        } else if (status != TAPFS_DONE) {
            park_move(transfer);
        } else if (transfer->kind == TAPFS_XEN_READ && transfer->memory == MEMORY_BUFFER) {
            if (!xen_pieces_fit(transfer)) {
                deliver(ring, &delivering);
            }
            xen_pieces_add(transfer);
            xen_append(&delivering, transfer);
        } else {
            done(transfer);
        }
    }
    deliver(ring, &delivering);
}

static void returned_move(struct xen_transfer *transfer)
{
    if (transfer->error == 0) {
        transfer->move.outcome.status = TAPFS_DONE;
        xen_move_ended(&transfer->move);
    } else if (transfer->request_count > 1) {
        split(transfer);
    } else {
        answer(transfer, STATUS_ERROR);
    }
}

static void synced(struct xen_transfer *transfer, int error)
{
    if (error != 0) {
        answer(transfer, STATUS_ERROR);
    } else if (transfer->stage == STAGE_SYNC_BEFORE && transfer->length > 0) {
        transfer->stage = STAGE_WRITE;
        transfer->kind = TAPFS_XEN_WRITE;
        xen_append(&transfer->ring->waiting, transfer);
    } else {
        answer(transfer, STATUS_OKAY);
    }
}

static void returned_sync(struct xen_transfer *transfer)
{
    struct xen_ring *ring = transfer->ring;
    int error = transfer->error;

    ring->sync = NULL;
    do {
        synced(transfer, error);
    } while ((transfer = xen_pop(&ring->syncing)) != NULL);
}

void xen_move_returned(struct xen_transfer *transfer)
{
    switch (transfer->kind) {
    case TAPFS_XEN_READ:
    case TAPFS_XEN_WRITE:
        returned_move(transfer);
        break;
    case TAPFS_XEN_SYNC:
        returned_sync(transfer);
        break;
    default:
        answer(transfer, transfer->error == 0            ? STATUS_OKAY
                         : transfer->error == EOPNOTSUPP ? STATUS_UNSUPPORTED
                                                         : STATUS_ERROR);
    }
}

/* ---- all of it */

static void park_gathered(struct xen_ring *ring)
{
    struct xen_transfer *transfer;
    while ((transfer = ring->gathering.first) != NULL && xen_pages_gather(transfer)) {
        xen_park(xen_pop(&ring->gathering));
    }
}

/* One for all that wait; who comes while it runs waits for the next. */
static void begin_sync(struct xen_ring *ring)
{
    if (ring->sync == NULL && ring->unsynced.first != NULL) {
        ring->sync = xen_pop(&ring->unsynced);
        ring->syncing = ring->unsynced;
        ring->unsynced = (struct xen_transfers){NULL, NULL};
        xen_park(ring->sync);
    }
}

void xen_move_run(struct xen_ring *ring)
{
    do {
        ring->buffers.returned = false;
        park_gathered(ring);
        borrow_waiting(ring);
        begin_waiting(ring);
        finish_ended(ring);
        if (ring->barrier != NULL && ring->barrier->stage == STAGE_DRAIN &&
            ring->requests_taken - ring->responses_written == 1) {
            xen_move_sync(ring->barrier, STAGE_SYNC_BEFORE);
        }
    } while (ring->buffers.returned && (ring->gathering.first != NULL || ring->waiting.first != NULL));
    begin_sync(ring);
}
