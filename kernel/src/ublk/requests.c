/*
 * Requests from their descriptor to their result: moved by the mover of their queue, or parked for the owner's threads
 * and given back by those. A write with FUA, and a flush, are a SYNC in the end.
 */
#include "ublk/internal.h"

static uint32_t metric_of(const struct ublk_request *request)
{
    switch (request->operation) {
    case OPERATION_READ:
        return TAPFS_METRIC_READ;
    case OPERATION_WRITE:
        return TAPFS_METRIC_WRITE;
    case OPERATION_FLUSH:
        return TAPFS_METRIC_FLUSH;
    case OPERATION_DISCARD:
        return TAPFS_METRIC_DISCARD;
    case OPERATION_WRITE_ZEROES:
        return TAPFS_METRIC_ZERO;
    default:
        return TAPFS_METRIC_OTHER;
    }
}

/* Whether the data of a read or write goes through our memory by calls of ours. */
static bool copies(const struct ublk_request *request)
{
    return request->queue->server->options.zero_copy != 0 && !request->passed;
}

static void answer(struct ublk_request *request, int error)
{
    struct ublk_queue *queue = request->queue;
    struct ublk_counters *counters = &queue->counters;
    bool moves = request->operation == OPERATION_READ || request->operation == OPERATION_WRITE;

    if (error == 0 && request->operation == OPERATION_READ && copies(request)) {
        error = queue->server->channel->copy(request);
    }

    metrics_end(&queue->server->metrics, metric_of(request), request->since, moves ? request->length : 0, error != 0);
    queue->in_flight--;
    atomic_store_explicit(&counters->in_flight, queue->in_flight, memory_order_relaxed);
    if (request->operation <= OPERATION_WRITE_ZEROES) {
        ublk_count(&counters->operations[request->operation], 1);
    }
    if (error != 0) {
        ublk_count(&counters->errors, 1);
    } else if (moves) {
        ublk_count(request->operation == OPERATION_READ ? &counters->read_bytes : &counters->written_bytes,
                   request->length);
    }
    queue->server->channel->commit(request, error != 0 ? -error : moves ? (int32_t)request->length : 0);
}

static void park(struct ublk_request *request)
{
    if (!ublk_park(request)) {
        answer(request, EIO);
    }
}

/* What was asked for is done; or it has failed. */
static void end(struct ublk_request *request, int error)
{
    if (error == 0 && request->durable && !request->synced) {
        request->synced = true;
        request->kind = TAPFS_UBLK_SYNC;
        park(request);
        return;
    }
    answer(request, error);
}

static void take_move(struct ublk_request *request)
{
    request->outcome = request->move.outcome;
    request->done = request->outcome.done;
    if (request->outcome.status == TAPFS_DONE) {
        end(request, 0);
    } else {
        park(request);
    }
}

static void move(struct ublk_request *request)
{
    struct ublk_queue *queue = request->queue;

    request->whole = (struct iovec){.iov_base = request->data, .iov_len = request->length};
    request->move = (struct move){
        .offset = request->offset,
        .length = request->length,
        .parts = &request->whole,
        .part_count = 1,
        .writing = request->kind == TAPFS_UBLK_WRITE,
        .context = request,
        .outcome.done = request->done,
    };
    if (mover_begin(queue->mover, &request->move)) {
        ublk_count(&queue->counters.at_once, 1);
        take_move(request);
    }
}

/* Have the kernel move the data between the file and the pages of the request. False: it must come through our memory. */
static bool pass(struct ublk_request *request)
{
    struct ublk_queue *queue = request->queue;
    struct mover_pass pass;

    request->move = (struct move){
        .offset = request->offset,
        .length = request->length,
        .writing = request->kind == TAPFS_UBLK_WRITE,
    };
    if (!mover_pass(queue->mover, &request->move, &pass)) {
        return false;
    }
    if (!queue->server->channel->pass(request, &pass)) {
        mover_passed(queue->mover, &request->move, -EAGAIN);
        return false;
    }
    return true;
}

/* Move the data through our memory. */
static void move_here(struct ublk_request *request)
{
    int error = 0;

    if (request->kind == TAPFS_UBLK_WRITE && copies(request)) {
        error = request->queue->server->channel->copy(request);
    }
    if (error != 0) {
        answer(request, error);
    } else {
        move(request);
    }
}

void ublk_passed(struct ublk_request *request, int32_t result)
{
    struct ublk_queue *queue = request->queue;

    if (mover_passed(queue->mover, &request->move, result)) {
        request->passed = true;
        request->done = request->length;
        ublk_count(&queue->counters.passed, 1);
        end(request, 0);
    } else {
        move_here(request); /* which meets the error itself, if it lasts */
    }
}

/* What is to be done for an operation; negative: nothing, it is refused. */
static int kind_of(uint32_t operation)
{
    switch (operation & OPERATION_MASK) {
    case OPERATION_READ:
        return TAPFS_UBLK_READ;
    case OPERATION_WRITE:
        return TAPFS_UBLK_WRITE;
    case OPERATION_FLUSH:
        return TAPFS_UBLK_SYNC;
    case OPERATION_DISCARD:
        return TAPFS_UBLK_DISCARD;
    case OPERATION_WRITE_ZEROES:
        return (operation & FLAG_NO_UNMAP) != 0 ? TAPFS_UBLK_FILL : TAPFS_UBLK_ZERO;
    default:
        return -1;
    }
}

/* Read the descriptor. 0 or the errno of a request that is not carried out. */
static int decode(struct ublk_request *request)
{
    const struct ublk_queue *queue = request->queue;
    const struct ublk_descriptor *told = &queue->descriptors[request->tag];
    const struct ublk_served *served = &queue->served;
    int kind = kind_of(told->operation);

    request->operation = told->operation & OPERATION_MASK;
    request->durable = (told->operation & FLAG_FUA) != 0;
    request->synced = request->goes_on = request->passed = false;
    request->done = 0;
    request->outcome = (tapfs_outcome){.status = TAPFS_DONE};
    request->disk = served->disk;
    if (kind < 0) {
        return EOPNOTSUPP;
    }
    request->kind = (uint32_t)kind;
    if (kind == TAPFS_UBLK_SYNC) {
        request->offset = request->length = 0;
        return 0;
    }
    request->length = (uint64_t)told->sectors * SECTOR_BYTES;
    if (told->first_sector > served->size / SECTOR_BYTES ||
        request->length > served->size - told->first_sector * SECTOR_BYTES) {
        return EIO;
    }
    request->offset = told->first_sector * SECTOR_BYTES;
    if (kind != TAPFS_UBLK_READ && !served->writable) {
        return EPERM;
    }
    bool moves = kind == TAPFS_UBLK_READ || kind == TAPFS_UBLK_WRITE;
    return moves && request->length > queue->server->options.max_bytes ? EIO : 0;
}

void ublk_begin(struct ublk_request *request)
{
    struct ublk_queue *queue = request->queue;

    queue->in_flight++;
    atomic_store_explicit(&queue->counters.in_flight, queue->in_flight, memory_order_relaxed);
    const struct ublk_descriptor *told = &queue->descriptors[request->tag];
    int error = decode(request);
    request->since = request->tried = metrics_begin(metric_of(request), request->offset, request->length);
    bool moves = request->kind == TAPFS_UBLK_READ || request->kind == TAPFS_UBLK_WRITE;
    if (error == 0) {
        rate_limit_charge(&queue->server->limit, moves ? request->length : 0);
    }
    if (error != 0) {
        answer(request, error);
    } else if (!moves) {
        park(request);
    } else if (!copies(request) || (told->operation & FLAG_NOT_IN_RING) != 0 || !pass(request)) {
        move_here(request);
    }
}

void ublk_moved(struct ublk_queue *queue)
{
    for (struct move *ended = mover_ended(queue->mover), *next; ended != NULL; ended = next) {
        next = ended->next;
        take_move(ended->context);
    }
}

void ublk_take_back(struct ublk_queue *queue)
{
    pthread_mutex_lock(&queue->returned_lock);
    struct ublk_request *returned = queue->returned.first;
    queue->returned = (struct ublk_list){.first = NULL};
    pthread_mutex_unlock(&queue->returned_lock);

    for (struct ublk_request *request = returned, *next; request != NULL; request = next) {
        next = request->next;
        if (request->goes_on) {
            request->goes_on = false;
            request->tried = rate_limit_now();
            move(request);
        } else {
            end(request, request->error);
        }
    }
}
