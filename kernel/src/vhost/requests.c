/*
 * Requests, from the moment they are decoded to their answer.
 *
 * A read or write goes to the ring's mover, piece by piece. The mover moves at once what the host has in its memory, straight
 * between the host's file and the guest's memory. What it lacks is parked for the owner's threads and given back by those. A
 * write that lacks places is gathered into memory of ours first, for the guest may change its own at any moment. Flushes,
 * zeroings and discards are parked at once.
 */
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>

#include "vhost/internal.h"

static void fail(struct vhost_request *request)
{
    vhost_log_read(request);
    request->status = STATUS_IOERR;
    vhost_queue_answer(request);
}

/* ---- parked */

void vhost_request_return(struct vhost_request *request)
{
    struct vhost_queue *queue = request->queue;

    pthread_mutex_lock(&queue->returned_lock);
    bool first = queue->returned == NULL;
    request->next = queue->returned;
    queue->returned = request;
    if (first) {
        /* Under the lock: once the ring's thread has the last request it may end. */
        eventfd_write(queue->wake_fd, 1);
    }
    pthread_mutex_unlock(&queue->returned_lock);
}

static uint32_t park_queue_of(const struct vhost_request *request)
{
    switch (request->kind) {
    case TAPFS_VHOST_WRITE:
        return request->move.outcome.status == TAPFS_RESERVE ? TAPFS_WRITES : TAPFS_MOVES;
    case TAPFS_VHOST_READ:
        return TAPFS_MOVES;
    case TAPFS_VHOST_SYNC:
        return TAPFS_SYNCS;
    default:
        return TAPFS_OTHERS;
    }
}

static void park(struct vhost_request *request)
{
    tapfs_vhost *device = request->queue->device;

    vhost_count(&device->counters.parked, 1);
    if (!park_put(&device->park, park_queue_of(request), &request->entry)) {
        fail(request);
    }
}

/* ---- done */

/* All that was asked for is done. */
static void finish(struct vhost_request *request)
{
    bool changed = request->type != TYPE_IN && request->type != TYPE_FLUSH;

    if (changed && request->queue->write_through && !request->syncing) {
        request->syncing = true;
        request->kind = TAPFS_VHOST_SYNC;
        park(request);
        return;
    }
    if (request->type == TYPE_IN) {
        request->written = (uint32_t)request->length;
    }
    vhost_queue_answer(request);
}

/* ---- reads and writes */

static void forget_gathered(struct vhost_request *request)
{
    free(request->gathered.iov_base);
    request->queue->gathered -= request->gathered.iov_len;
    request->gathered = (struct iovec){.iov_base = NULL};
}

/* Copy what a piece writes. False: others have the memory that is left for this. */
static bool gather(struct vhost_request *request)
{
    struct vhost_queue *queue = request->queue;
    struct move *move = &request->move;

    if (queue->gathered > 0 && queue->gathered + move->length > GATHERED_BYTES_MAX) {
        return false;
    }
    uint8_t *bytes = malloc(move->length), *at = bytes;
    if (bytes == NULL) {
        if (queue->gathered > 0) {
            return false;
        }
        fail(request);
        return true;
    }
    for (uint32_t i = 0; i < move->part_count; i++) {
        memcpy(at, move->parts[i].iov_base, move->parts[i].iov_len);
        at += move->parts[i].iov_len;
    }
    queue->gathered += move->length;
    request->gathered = (struct iovec){.iov_base = bytes, .iov_len = move->length};
    move->parts = &request->gathered;
    move->part_count = 1;
    park(request);
    return true;
}

static void park_gathered(struct vhost_queue *queue)
{
    struct vhost_request *request;

    while ((request = queue->gathering) != NULL) {
        struct vhost_request *next = request->next;
        if (!gather(request)) {
            return;
        }
        queue->gathering = next;
        if (next == NULL) {
            queue->gathering_end = &queue->gathering;
        }
    }
}

static void gather_and_park(struct vhost_request *request)
{
    struct vhost_queue *queue = request->queue;

    if (request->gathered.iov_base != NULL) {
        park(request);
        return;
    }
    if (queue->gathering == NULL && gather(request)) {
        return;
    }
    request->next = NULL;
    *queue->gathering_end = request;
    queue->gathering_end = &request->next;
}

/* The next piece, as many whole parts as it has room for, and a piece of one more. */
static void cut_piece(struct vhost_request *request)
{
    struct iovec *parts = request->parts + request->part;
    uint32_t left = request->part_count - request->part, count = 0;
    uint64_t length = 0;

    request->rest = (struct iovec){.iov_len = 0};
    while (count < left && count < MOVE_PARTS_MAX && length < PIECE_BYTES) {
        struct iovec *part = &parts[count++];
        size_t taken = (size_t)minimum(part->iov_len, PIECE_BYTES - length);
        if (taken < part->iov_len) {
            request->rest = (struct iovec){(uint8_t *)part->iov_base + taken, part->iov_len - taken};
            part->iov_len = taken;
        }
        length += taken;
    }
    request->piece_parts = count;
    request->move = (struct move){
        .offset = request->offset + request->done,
        .length = length,
        .parts = parts,
        .part_count = count,
        .writing = request->kind == TAPFS_VHOST_WRITE,
        .context = request,
    };
}

/* A piece has ended: whether another one is left. */
static bool piece_is_done(struct vhost_request *request)
{
    vhost_log_read(request);
    request->done += request->move.length;
    request->part += request->piece_parts;
    if (request->rest.iov_len > 0) {
        request->parts[--request->part] = request->rest;
    }
    if (request->gathered.iov_base != NULL) {
        forget_gathered(request);
    }
    return request->done < request->length;
}

/* The mover has ended a piece: whether the next one is to be begun. */
static bool piece_has_ended(struct vhost_request *request)
{
    int32_t status = request->move.outcome.status;

    if (status == TAPFS_RESERVE) {
        gather_and_park(request);
    } else if (status != TAPFS_DONE) {
        park(request);
    } else if (piece_is_done(request)) {
        return true;
    } else {
        finish(request);
    }
    return false;
}

/* Have this piece moved, and those after it as long as they end at once. */
static void move_on(struct vhost_request *request)
{
    struct vhost_queue *queue = request->queue;

    while (mover_begin(queue->mover, &request->move)) {
        if (!piece_has_ended(request)) {
            return;
        }
        cut_piece(request);
    }
    vhost_count(&queue->device->counters.waited, 1);
}

static void begin_next_piece(struct vhost_request *request)
{
    cut_piece(request);
    move_on(request);
}

void vhost_requests_moved(struct vhost_queue *queue)
{
    for (struct move *move = mover_ended(queue->mover), *next; move != NULL; move = next) {
        next = move->next;
        struct vhost_request *request = move->context;
        if (piece_has_ended(request)) {
            begin_next_piece(request);
        }
    }
    park_gathered(queue);
}

/* ---- zeroings and discards */

/* Have the next of its ranges done. */
static void begin_range(struct vhost_request *request)
{
    while (request->range < request->range_count && request->ranges[request->range].length == 0) {
        request->range++;
    }
    if (request->range == request->range_count) {
        finish(request);
        return;
    }
    request->kind = request->ranges[request->range].kind;
    park(request);
}

/* ---- all of them */

void vhost_request_begin(struct vhost_request *request)
{
    request->since = metrics_begin(vhost_metric_of(request->type), request->offset, request->length);
    request->tried = request->since;
    bool moves = request->type == TYPE_IN || request->type == TYPE_OUT;
    rate_limit_charge(&request->queue->device->limit, moves ? request->length : 0);
    if (request->status != STATUS_OK) {
        vhost_queue_answer(request);
        return;
    }
    switch (request->type) {
    case TYPE_IN:
    case TYPE_OUT:
        if (request->length > 0) {
            begin_next_piece(request);
        } else {
            finish(request);
        }
        break;
    case TYPE_FLUSH:
        park(request);
        break;
    case TYPE_GET_ID:
        vhost_queue_answer(request);
        break;
    default:
        begin_range(request);
    }
}

static void go_on(struct vhost_request *request)
{
    if (request->left && request->queue->track.states != NULL && !request->queue->drains) {
        vhost_queue_forget(request);
    } else if (request->goes_on) {
        request->goes_on = false;
        request->tried = rate_limit_now();
        move_on(request);
    } else if (request->error != 0) {
        fail(request);
    } else if (request->kind == TAPFS_VHOST_SYNC) {
        finish(request);
    } else if (request->kind != TAPFS_VHOST_WRITE) {
        request->range++;
        begin_range(request);
    } else if (piece_is_done(request)) {
        begin_next_piece(request);
    } else {
        finish(request);
    }
}

void vhost_requests_returned(struct vhost_queue *queue)
{
    eventfd_t count;

    pthread_mutex_lock(&queue->returned_lock);
    eventfd_read(queue->wake_fd, &count);
    struct vhost_request *request = queue->returned;
    queue->returned = NULL;
    pthread_mutex_unlock(&queue->returned_lock);
    while (request != NULL) {
        struct vhost_request *next = request->next;
        go_on(request);
        request = next;
    }
    park_gathered(queue);
}
