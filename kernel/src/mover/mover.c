/* Moves: locate one, move at once what the host has in memory, give the rest to io_uring or to a worker. */
#include <errno.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <unistd.h>

#include "mover/internal.h"

#define DEPTH_MAX 4096u

struct mover {
    tapfs_disk *disk;
    uint32_t in_flight;
    int poll_fd; /* epoll: the ring and the workers' event */
    struct flight *flights, *idle;
    struct move *ended; /* by the owner's thread, the last one first */
    enum mover_ring ring;
    struct io_rings rings;
    struct uring_memory memory;
    struct workers workers;
};

/* What has become of a move. */
enum step { ENDED, AWAY };

/* The owner's thread lets go of the move: the outcome stands but for `done`, or a worker goes on from there. */
static void leave(struct mover *mover, struct flight *flight)
{
    struct request *request = &flight->request;
    uint64_t moved = request->position - flight->start;

    request->outcome->done = request->position - flight->move->offset;
    if (moved > 0) {
        atomic_fetch_add(flight->move->writing ? &request->disk->bytes_written : &request->disk->bytes_read, moved);
    }
    if (flight->move->writing) {
        /* Of a run that failed, or that a worker goes on with, a part may be written. */
        tapfs_disk_note_written(request->disk, flight->start, flight->end - flight->start);
    }
    request_end(request);
    flight->next = mover->idle;
    mover->idle = flight;
}

static enum step finish(struct mover *mover, struct flight *flight)
{
    leave(mover, flight);
    return ENDED;
}

/* The worker looks at the map anew, so waiting for one holds up no quiesce. */
static enum step hand_over(struct mover *mover, struct flight *flight)
{
    struct move *move = flight->move;
    leave(mover, flight);
    workers_add(&mover->workers, move);
    return AWAY;
}

static enum step advance(struct mover *mover, struct flight *flight);

/* None of the runs is with the host any more: the first that was not moved says how it goes on. */
static enum step settle(struct mover *mover, struct flight *flight)
{
    struct request *request = &flight->request;
    bool writing = flight->move->writing;

    for (uint32_t i = 0; i < flight->begun; i++) {
        const struct run *run = &flight->route.runs[i];
        const struct run_io *io = &flight->ios[i];
        if (io->state == RUN_IO_FAILED) {
            request_fail(request, io->error, writing ? "write" : "read", run->layer, run->file_index,
                         run->host_offset + (writing ? 0 : io->moved));
            return finish(mover, flight);
        }
        if (io->state == RUN_IO_REFUSED) {
            /* A write that fails is reported by the start of its run, so that is where the engine begins. */
            request->position = run->offset + (writing ? 0 : io->moved);
            return hand_over(mover, flight);
        }
        request->position = run->offset + run->length;
    }
    return advance(mover, flight);
}

/* One run less is with the host. */
static void land(struct mover *mover, struct flight *flight)
{
    struct move *move = flight->move;
    if (--flight->pending == 0 && settle(mover, flight) == ENDED) {
        move->next = mover->ended;
        mover->ended = move;
    }
}

static struct flight *flight_of(const struct mover *mover, uint64_t tag, uint32_t *index)
{
    *index = (uint32_t)(tag % ROUTE_RUNS);
    return &mover->flights[tag / ROUTE_RUNS];
}

/* What the kernel does not take is for the workers. */
static void submit(struct mover *mover)
{
    uint64_t tag;
    uint32_t index;

    if (io_rings_submit(&mover->rings)) {
        return;
    }
    while (uring_take_back(&mover->rings, &tag)) {
        struct flight *flight = flight_of(mover, tag, &index);
        run_io_end(flight, index, RUN_IO_REFUSED);
        land(mover, flight);
    }
}

static bool queue(struct mover *mover, struct flight *flight, uint32_t index)
{
    if (io_rings_full(&mover->rings)) {
        submit(mover);
    }
    uint64_t tag = (uint64_t)flight->index * ROUTE_RUNS + index;
    bool outlives = flight->move->writing && flight->route.runs[index].file->ranged;
    if ((outlives && mover->ring == RING_MORTAL) ||
        !run_io_queue(flight, index, &mover->rings, &mover->memory, tag)) {
        run_io_end(flight, index, RUN_IO_REFUSED);
        return false;
    }
    flight->pending++;
    return true;
}

/* Give the ring what it takes of the runs from `index` on, which is prepared and did not move at once. */
static enum step fly(struct mover *mover, struct flight *flight, uint32_t index)
{
    /* Counted as one more meanwhile: a submission that fails must not settle this flight. */
    flight->pending = 1;
    bool taken = queue(mover, flight, index);
    for (index++; taken && index < flight->route.count; index++) {
        run_io_prepare(flight, index);
        taken = flight->route.runs[index].file == NULL ? run_io_at_once(flight, index) == RUN_IO_MOVED
                                                       : queue(mover, flight, index);
    }
    flight->begun = index;
    return --flight->pending == 0 ? settle(mover, flight) : AWAY;
}

static enum step advance(struct mover *mover, struct flight *flight)
{
    struct request *request = &flight->request;
    const struct route *route = &flight->route;

    while (request->position < flight->end) {
        locate(request->disk, flight->move->writing, request->position, flight->end - request->position,
               &flight->route);
        run_ios_begin(flight);
        for (uint32_t i = 0; i < route->count; i++) {
            run_io_prepare(flight, i);
            flight->begun = i + 1;
            int state = run_io_may_be_queued_first(flight, i, &mover->rings) ? RUN_IO_WAITING
                                                                            : run_io_at_once(flight, i);
            if (state != RUN_IO_MOVED) {
                return state == RUN_IO_WAITING ? fly(mover, flight, i) : settle(mover, flight);
            }
            request->position = route->runs[i].offset + route->runs[i].length;
        }
        if (route->by_engine) {
            return hand_over(mover, flight);
        }
        if (route->stop != TAPFS_DONE) {
            request_stop(request, route->stop, route->stop_layer, route->stop_offset, route->stop_length);
            break;
        }
    }
    return finish(mover, flight);
}

/* Outside of mover_ended: what ended here is brought by the next. */
static void announce(struct mover *mover)
{
    while (mover->ended != NULL) {
        struct move *move = mover->ended;
        mover->ended = move->next;
        workers_report(&mover->workers, move);
    }
}

bool mover_begin(struct mover *mover, struct move *move)
{
    struct flight *flight = mover->idle;

    mover->in_flight++;
    if (flight == NULL) {
        workers_add(&mover->workers, move);
        return false;
    }
    mover->idle = flight->next;
    uint64_t done = move->outcome.done;
    request_begin(&flight->request, mover->disk, &move->outcome);
    flight->request.position = flight->start = move->offset + done;
    flight->end = move->offset + minimum(move->length, UINT64_MAX - move->offset);
    flight->move = move;
    flight->cursor = move->offset;
    flight->part = 0;
    flight->part_inner = 0;
    enum step step = advance(mover, flight);
    announce(mover);
    mover->in_flight -= step == ENDED;
    return step == ENDED;
}

/* Begin a request for a move that others may do, in the first idle flight; NULL: it is not one run. */
static struct flight *single_run(struct mover *mover, struct move *move)
{
    struct flight *flight = mover->idle;
    if (flight == NULL) {
        return NULL;
    }
    struct request *request = &flight->request;
    const struct route *route = &flight->route;

    request_begin(request, mover->disk, &move->outcome);
    request->position = flight->start = move->offset;
    flight->end = move->offset + move->length;
    flight->move = move;
    locate(request->disk, move->writing, move->offset, move->length, &flight->route);
    if (route->count != 1 || route->runs[0].length != move->length) {
        request_end(request);
        return NULL;
    }
    return flight;
}

static void take_off(struct mover *mover, struct flight *flight)
{
    mover->idle = flight->next;
    mover->in_flight++;
    flight->move->flight = flight->index;
}

bool mover_pass(struct mover *mover, struct move *move, struct mover_pass *pass)
{
    struct flight *flight = single_run(mover, move);
    if (flight == NULL) {
        return false;
    }
    if (!run_io_claim(flight)) {
        run_io_end(flight, 0, RUN_IO_REFUSED);
        request_end(&flight->request);
        return false;
    }
    const struct run *run = &flight->route.runs[0];
    *pass = (struct mover_pass){
        .fd = run->file->fd,
        .by_thread = atomic_load(&run->file->refuses_nowait[move->writing]),
        .offset = run->file->start + run->host_offset,
    };
    take_off(mover, flight);
    return true;
}

const uint8_t *mover_lend(struct mover *mover, struct move *move)
{
    struct flight *flight = single_run(mover, move);
    if (flight == NULL) {
        return NULL;
    }
    const struct run *run = &flight->route.runs[0];
    const uint8_t *bytes = run->file == NULL ? NULL : host_mapped(run->file, run->host_offset, run->length);
    if (bytes == NULL) {
        request_end(&flight->request);
        return NULL;
    }
    flight->begun = 1;
    flight->ios[0] = (struct run_io){.state = RUN_IO_WAITING};
    take_off(mover, flight);
    return bytes;
}

bool mover_passed(struct mover *mover, struct move *move, int32_t result)
{
    struct flight *flight = &mover->flights[move->flight];
    bool whole = result >= 0 && (uint64_t)result == move->length;

    if (move->writing) {
        host_wrote(flight->route.runs[0].file);
    }
    run_io_end(flight, 0, whole ? RUN_IO_MOVED : RUN_IO_REFUSED);
    if (whole) {
        flight->request.position = flight->end;
    }
    leave(mover, flight);
    mover->in_flight--;
    return whole;
}

void mover_submit(struct mover *mover)
{
    submit(mover);
    announce(mover);
}

struct move *mover_ended(struct mover *mover)
{
    uint64_t tag;
    uint32_t index;
    int32_t result;

    while (io_rings_next(&mover->rings, &tag, &result)) {
        struct flight *flight = flight_of(mover, tag, &index);
        if (run_io_complete(flight, index, result, &mover->rings, &mover->memory, tag)) {
            land(mover, flight);
        }
    }
    submit(mover);
    struct move *ended = workers_ended(&mover->workers), **end = &ended;
    for (; *end != NULL; end = &(*end)->next) {
        mover->in_flight--;
    }
    *end = mover->ended;
    mover->ended = NULL;
    for (; *end != NULL; end = &(*end)->next) {
        mover->in_flight--;
    }
    return ended;
}

int mover_fd(const struct mover *mover)
{
    return mover->poll_fd;
}

uint32_t mover_in_flight(const struct mover *mover)
{
    return mover->in_flight;
}

void mover_offer_memory(struct mover *mover, uint8_t *memory, size_t bytes)
{
    mover->memory = (struct uring_memory){.start = memory, .bytes = bytes};
}

bool mover_has_io_uring(const struct mover *mover)
{
    return mover->rings.fd >= 0;
}

void mover_set_disk(struct mover *mover, tapfs_disk *disk)
{
    mover->disk = disk;
    workers_set_disk(&mover->workers, disk);
}

/* ---- life */

static int watch(const struct mover *mover, int fd)
{
    struct epoll_event event = {.events = EPOLLIN};
    return epoll_ctl(mover->poll_fd, EPOLL_CTL_ADD, fd, &event) < 0 ? errno : 0;
}

static int open_parts(struct mover *mover, uint32_t depth, uint32_t workers)
{
    mover->flights = calloc(depth, sizeof *mover->flights);
    if (mover->flights == NULL) {
        return ENOMEM;
    }
    for (uint32_t i = depth; i > 0; i--) {
        struct flight *flight = &mover->flights[i - 1];
        flight->index = i - 1;
        flight->next = mover->idle;
        mover->idle = flight;
    }
    if (mover->ring != RING_NONE && uring_open(&mover->rings, depth)) {
        int error = watch(mover, mover->rings.fd);
        if (error != 0) {
            return error;
        }
    }
    int error = workers_start(&mover->workers, mover->disk, workers);
    if (error == 0) {
        error = watch(mover, mover->workers.event_fd);
        if (error != 0) {
            workers_stop(&mover->workers);
        }
    }
    return error;
}

static void close_parts(struct mover *mover)
{
    io_rings_close(&mover->rings);
    close(mover->poll_fd);
    free(mover->flights);
    free(mover);
}

struct mover *mover_new(tapfs_disk *disk, uint32_t depth, uint32_t workers, enum mover_ring ring)
{
    if (depth == 0 || depth > DEPTH_MAX || workers == 0) {
        errno = EINVAL;
        return NULL;
    }
    struct mover *mover = calloc(1, sizeof *mover);
    if (mover == NULL) {
        return NULL;
    }
    mover->disk = disk;
    mover->ring = ring;
    mover->rings.fd = -1;
    mover->poll_fd = epoll_create1(EPOLL_CLOEXEC);
    if (mover->poll_fd < 0) {
        free(mover);
        return NULL;
    }
    int error = open_parts(mover, depth, workers);
    if (error != 0) {
        close_parts(mover);
        errno = error;
        return NULL;
    }
    return mover;
}

void mover_free(struct mover *mover)
{
    workers_stop(&mover->workers);
    close_parts(mover);
}
