/*
 * READs and WRITEs of data nodes, between their buffers and the disk.
 *
 * A native thread moves what the host gives or takes without waiting. What would wait goes to a thread of its own,
 * which has the mover move it and answers it. So the threads that read the connection are there for the next request,
 * however slow the host is.
 */
#include <errno.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "fuse/internal.h"

/* Moves that are with the host at once, and threads for those that io_uring does not do. */
#define DEPTH (READ_BUFFERS + WRITE_BUFFERS)
#define WORKERS 32u

/* ---- in the calling thread */

static uint8_t *data_of(const struct fuse_call *call)
{
    return call->buffer->memory + BUFFER_DATA_AT;
}

/* One piece of the disk, by the engine's own functions. */
static void run_piece(tapfs_fuse *server, struct fuse_call *call, const struct fuse_place *place, uint32_t flags)
{
    uint8_t *data = data_of(call) + call->done;
    if (call->request == TAPFS_FUSE_READ) {
        tapfs_read(server->disk, data, place->offset, place->length, flags, &call->outcome);
    } else {
        tapfs_write(server->disk, data, place->offset, place->length, flags, &call->outcome);
    }
}

/* The status. */
static int32_t run(tapfs_fuse *server, struct fuse_call *call, uint32_t flags)
{
    do {
        const struct fuse_place place = fuse_place_of(call);
        if (place.metadata) {
            fuse_read_metadata(call, &place);
        } else {
            run_piece(server, call, &place, flags);
        }
        call->done += call->outcome.done;
    } while (call->outcome.status == TAPFS_DONE && call->done < call->length);
    return call->outcome.status;
}

static enum fuse_fate fate_of(int32_t status)
{
    return status == TAPFS_DONE ? FATE_MOVED : status == TAPFS_AGAIN ? FATE_WAITS : FATE_LACKS;
}

enum fuse_fate fuse_move_at_once(tapfs_fuse *server, struct fuse_call *call)
{
    return fate_of(run(server, call, TAPFS_NOWAIT));
}

enum fuse_fate fuse_move_waiting(tapfs_fuse *server, struct fuse_call *call)
{
    return fate_of(run(server, call, 0));
}

/* False: all other threads sit already. */
static bool sit_down(tapfs_fuse *server)
{
    uint32_t sitting = atomic_load(&server->sitting);
    do {
        if (sitting + 1 >= server->thread_count) {
            return false;
        }
    } while (!atomic_compare_exchange_weak(&server->sitting, &sitting, sitting + 1));
    return true;
}

enum fuse_fate fuse_move_in_thread(tapfs_fuse *server, struct fuse_call *call)
{
    enum fuse_fate fate = fuse_move_at_once(server, call);
    if (fate == FATE_WAITS && call->outcome.error == EOPNOTSUPP && sit_down(server)) {
        fate = fuse_move_waiting(server, call);
        atomic_fetch_sub(&server->sitting, 1);
    }
    return fate;
}

/* ---- calls that wait for the host */

static void append(struct fuse_calls *calls, struct fuse_call *call)
{
    call->next = NULL;
    *(calls->first != NULL ? &calls->last->next : &calls->first) = call;
    calls->last = call;
}

static struct fuse_call *pop(struct fuse_calls *calls)
{
    struct fuse_call *call = calls->first;
    if (call != NULL) {
        calls->first = call->next;
    }
    return call;
}

bool fuse_moves_add(tapfs_fuse *server, struct fuse_call *call)
{
    struct fuse_moves *moves = &server->moves;

    pthread_mutex_lock(&moves->lock);
    bool closed = moves->closed, first = moves->added.first == NULL;
    if (!closed) {
        atomic_fetch_add_explicit(&server->waited, 1, memory_order_relaxed);
        append(&moves->added, call);
    }
    pthread_mutex_unlock(&moves->lock);
    if (!closed && first) {
        eventfd_write(moves->wake_fd, 1);
    }
    return !closed;
}

/* ---- in the thread that owns the mover */

/* `outcome` says how a piece has ended. False: so has the call, or it is parked. */
static bool goes_on(tapfs_fuse *server, struct fuse_call *call)
{
    call->done += call->outcome.done;
    if (call->outcome.status == TAPFS_DONE) {
        if (call->done < call->length) {
            return true;
        }
        fuse_end(server, call, 0, 0);
        return false;
    }
    if (call->request == TAPFS_FUSE_READ && call->done == 0) {
        fuse_buffer_return(server, call->buffer);
        call->buffer = NULL;
    }
    fuse_park(server, call);
    return false;
}

/* False: it is with the host. */
static bool piece_ends_at_once(tapfs_fuse *server, struct fuse_call *call)
{
    const struct fuse_place place = fuse_place_of(call);

    if (place.metadata) {
        fuse_read_metadata(call, &place);
        return true;
    }
    call->whole = (struct iovec){.iov_base = data_of(call) + call->done, .iov_len = place.length};
    call->move = (struct move){
        .offset = place.offset,
        .length = place.length,
        .parts = &call->whole,
        .part_count = 1,
        .writing = call->request == TAPFS_FUSE_WRITE,
        .context = call,
    };
    if (!mover_begin(server->moves.mover, &call->move)) {
        return false;
    }
    call->outcome = call->move.outcome;
    return true;
}

static void begin(tapfs_fuse *server, struct fuse_call *call)
{
    while (piece_ends_at_once(server, call) && goes_on(server, call)) {
    }
}

/* Give READs buffers and begin them, in their order, as far as there are buffers. */
static void begin_unbegun(tapfs_fuse *server)
{
    struct fuse_moves *moves = &server->moves;
    struct fuse_call *call;
    bool never;

    while ((call = moves->unbegun.first) != NULL) {
        call->buffer = fuse_buffer_for_read(server, &never);
        if (call->buffer != NULL) {
            atomic_store(&moves->starved, false);
            begin(server, pop(&moves->unbegun));
        } else if (never) {
            fuse_end(server, pop(&moves->unbegun), ENOMEM, 0);
        } else if (atomic_exchange(&moves->starved, true)) {
            return; /* who returns one wakes this thread */
        }
    }
}

/* False: the thread is to end. */
static bool begin_added(tapfs_fuse *server)
{
    struct fuse_moves *moves = &server->moves;
    struct fuse_call *call;

    pthread_mutex_lock(&moves->lock);
    struct fuse_calls added = moves->added;
    bool closed = moves->closed;
    moves->added = (struct fuse_calls){.first = NULL};
    pthread_mutex_unlock(&moves->lock);
    while ((call = pop(&added)) != NULL) {
        if (call->buffer == NULL || closed) {
            append(&moves->unbegun, call);
        } else {
            begin(server, call);
        }
    }
    while (closed && (call = pop(&moves->unbegun)) != NULL) {
        fuse_end(server, call, EIO, 0);
    }
    begin_unbegun(server);
    mover_submit(moves->mover);
    return !closed;
}

static void end_moved(tapfs_fuse *server)
{
    for (struct move *move = mover_ended(server->moves.mover), *next; move != NULL; move = next) {
        struct fuse_call *call = move->context;
        next = move->next;
        call->outcome = move->outcome;
        if (goes_on(server, call)) {
            begin(server, call); /* begin_added submits it */
        }
    }
}

static void *serve(void *argument)
{
    tapfs_fuse *server = argument;
    struct fuse_moves *moves = &server->moves;
    struct pollfd waits[2] = {
        {.fd = moves->wake_fd, .events = POLLIN},
        {.fd = mover_fd(moves->mover), .events = POLLIN},
    };
    eventfd_t count;

    while (begin_added(server) || mover_in_flight(moves->mover) > 0) {
        if (poll(waits, 2, -1) > 0 && waits[0].revents != 0) {
            eventfd_read(moves->wake_fd, &count);
        }
        end_moved(server);
    }
    return NULL;
}

/* ---- life */

int fuse_moves_start(tapfs_fuse *server)
{
    struct fuse_moves *moves = &server->moves;

    moves->mover = mover_new(server->disk, DEPTH, WORKERS, RING_MORTAL);
    if (moves->mover == NULL) {
        return errno;
    }
    int error = pthread_create(&moves->thread, NULL, serve, server);
    moves->started = error == 0;
    if (error != 0) {
        mover_free(moves->mover);
    }
    return error;
}

void fuse_moves_close(tapfs_fuse *server)
{
    struct fuse_moves *moves = &server->moves;

    pthread_mutex_lock(&moves->lock);
    moves->closed = true;
    pthread_mutex_unlock(&moves->lock);
    eventfd_write(moves->wake_fd, 1);
}

void fuse_moves_join(tapfs_fuse *server)
{
    if (server->moves.started) {
        pthread_join(server->moves.thread, NULL);
        mover_free(server->moves.mover);
        server->moves.started = false;
    }
}
