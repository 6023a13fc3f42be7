/*
 * The wait of a ring's thread for requests, for its mover, and for whoever wakes it. It looks at the ring for a while, and
 * then sleeps until one of three descriptors says something.
 *
 * One io_uring_enter opens the channel for the next notification, sleeps, and has read what woke the thread. Where the kernel
 * has no io_uring for us, or one that is too old, these are a write, a ppoll and a read.
 */
#include <errno.h>
#include <linux/io_uring.h>
#include <poll.h>
#include <string.h>
#include <unistd.h>

#include "xen/internal.h"

/*
 * How long the thread looks for a request before it sleeps: as long as a sleep and its interrupts cost processor time,
 * so looking in vain at most doubles that. Between looks at the clock there are WATCH_LOOKS at the ring.
 */
#define WATCH_MIN_NS UINT64_C(2000)
#define WATCH_MAX_NS UINT64_C(12000)
#define WATCH_LOOKS 8u

/* Tags beside those of the sources. */
#define TAG_OPENED (SOURCES + 0u)
#define TAG_CANCELLED (SOURCES + 1u)
/* What is queued at once: the sources, the opening of the channel, and the end of each source. */
#define ENTRIES 8u
/* No interrupt for what is completed: it waits until the thread waits. Linux 6.1; an older one does without. */
#define BATCHED_COMPLETIONS (IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN)
/* A read that is to end is waited for so often, a second each. */
#define END_WAITS 10
#define SECOND_NS UINT64_C(1000000000)

static const uint8_t OPERATIONS[] = {IORING_OP_READ, IORING_OP_WRITE, IORING_OP_POLL_ADD, IORING_OP_ASYNC_CANCEL};
static const struct io_rings_use USE = {
    .operations = OPERATIONS,
    .operation_count = sizeof OPERATIONS,
    .entry_flags = IOSQE_CQE_SKIP_SUCCESS,
};

/* ---- by looking at the ring */

/* Have the frontend notify us of the next request, unless it is there already. */
static bool has_requests(struct xen_ring *ring)
{
    struct ring_indices *indices = xen_ring_indices(ring);
    atomic_store(&indices->requests_event, ring->requests_taken + 1);
    return atomic_load(&indices->requests_produced) != ring->requests_taken;
}

static void processor_relax(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/*
 * Look for the next request for a while, before it costs a sleep, two interrupts and their system calls. The frontend
 * need not notify us meanwhile. True: there is something to do.
 */
static bool watch(struct xen_ring *ring)
{
    const struct ring_indices *indices = xen_ring_indices(ring);
    tapfs_xen *device = ring->device;
    struct xen_rest *rest = &ring->rest;

    if (rest->watch_ns == 0 || mover_in_flight(ring->mover) > 0) {
        return false;
    }
    for (uint64_t end = rate_limit_now() + rest->watch_ns; rate_limit_now() < end;) {
        for (unsigned looks = 0; looks < WATCH_LOOKS; looks++) {
            if (atomic_load_explicit(&indices->requests_produced, memory_order_relaxed) != ring->requests_taken) {
                rest->watch_ns = minimum(2 * rest->watch_ns, WATCH_MAX_NS);
                return true;
            }
            if (atomic_load(&ring->has_returned) || atomic_load(&device->paused) || atomic_load(&device->stopping)) {
                return true;
            }
            processor_relax();
        }
    }
    /* In vain: the next look is shorter, and none follows the shortest until a sleep has been short. */
    rest->watch_ns = rest->watch_ns > WATCH_MIN_NS ? rest->watch_ns / 2 : 0;
    return false;
}

bool xen_rest_allowed(struct xen_ring *ring)
{
    if (watch(ring)) {
        return false;
    }
    /* Not before: until then the channel stays masked, and what the frontend sends interrupts nobody. A ring of io_uring opens
     * the channel after the look below, and loses nothing: only a read takes a notification away, and it wakes us. */
    if (ring->rest.notified && ring->rest.rings.fd < 0) {
        ring->rest.notified = false;
        xen_channel_clear(ring->channel);
    }
    return !has_requests(ring);
}

static void note_notification(struct xen_rest *rest)
{
    rest->notified = true;
    if (rate_limit_now() - rest->since < WATCH_MAX_NS) {
        rest->watch_ns = maximum(rest->watch_ns, WATCH_MIN_NS);
    }
}

/* ---- by ppoll */

static void wait_by_poll(struct xen_ring *ring, bool open, uint64_t delay)
{
    const struct timespec timeout = {.tv_sec = (time_t)(delay / SECOND_NS), .tv_nsec = (long)(delay % SECOND_NS)};
    struct pollfd waits[SOURCES] = {
        [SOURCE_WAKE] = {.fd = ring->wake_fd, .events = POLLIN},
        [SOURCE_MOVER] = {.fd = mover_fd(ring->mover), .events = POLLIN},
        [SOURCE_CHANNEL] = {.fd = xen_channel_fd(ring->channel), .events = POLLIN},
    };
    uint64_t count;

    /* While nothing is taken the channel may stay readable. */
    if (ppoll(waits, open ? SOURCES : SOURCE_CHANNEL, delay > 0 ? &timeout : NULL, NULL) <= 0) {
        return;
    }
    if (waits[SOURCE_WAKE].revents != 0) {
        ssize_t got = read(ring->wake_fd, &count, sizeof count);
        (void)got; /* it is non-blocking */
    }
    if (waits[SOURCE_CHANNEL].revents != 0) {
        note_notification(&ring->rest);
    }
}

/* ---- by io_uring */

static void ask(struct xen_rest *rest, enum xen_source source, uint8_t operation, int fd, void *memory, uint32_t bytes)
{
    struct io_uring_sqe *entry = rest->asked[source] ? NULL : io_rings_entry(&rest->rings);
    if (entry == NULL) {
        return;
    }
    *entry = (struct io_uring_sqe){
        .opcode = operation, .fd = fd, .addr = (uintptr_t)memory, .len = bytes, .user_data = source};
    if (operation == IORING_OP_POLL_ADD) {
        entry->poll32_events = POLLIN;
    }
    rest->asked[source] = true;
}

/* Says something only where it fails. */
static void open_channel(struct xen_rest *rest, const struct xen_channel *channel)
{
    const void *opener;
    size_t bytes = xen_channel_opener(channel, &opener);
    struct io_uring_sqe *entry = bytes == 0 ? NULL : io_rings_quiet_entry(&rest->rings);

    if (entry != NULL) {
        *entry = (struct io_uring_sqe){
            .opcode = IORING_OP_WRITE,
            .flags = IOSQE_CQE_SKIP_SUCCESS,
            .fd = xen_channel_fd(channel),
            .addr = (uintptr_t)opener,
            .len = (uint32_t)bytes,
            .user_data = IO_RINGS_QUIET | TAG_OPENED,
        };
    }
    rest->notified = bytes != 0 && entry == NULL;
}

/* What the kernel has to say. False: something that this kernel's io_uring does not do for us. */
static bool hear(struct xen_rest *rest)
{
    uint64_t tag;
    int32_t result;
    bool all_done = true;

    while (io_rings_next(&rest->rings, &tag, &result)) {
        tag &= ~IO_RINGS_QUIET;
        if (tag == TAG_OPENED) {
            rest->notified = true;
            all_done = false;
        } else if (tag < SOURCES) {
            rest->asked[tag] = false;
            all_done &= result > 0;
            if (tag == SOURCE_CHANNEL && result > 0) {
                note_notification(rest);
            }
        }
    }
    return all_done;
}

static bool asks(const struct xen_rest *rest)
{
    return rest->asked[SOURCE_WAKE] || rest->asked[SOURCE_MOVER] || rest->asked[SOURCE_CHANNEL];
}

static bool may_wait_again(int error)
{
    return error == 0 || error == EINTR || error == ETIME || error == EBUSY || error == EAGAIN;
}

/* From now on by ppoll. What was asked for is over before: the kernel reads nothing for us any more, nor keeps a descriptor. */
static void leave(struct xen_rest *rest)
{
    for (uint32_t source = 0; source < SOURCES; source++) {
        struct io_uring_sqe *entry = rest->asked[source] ? io_rings_entry(&rest->rings) : NULL;
        if (entry != NULL) {
            *entry = (struct io_uring_sqe){
                .opcode = IORING_OP_ASYNC_CANCEL, .fd = -1, .addr = source, .user_data = TAG_CANCELLED};
        }
    }
    for (int waits = 0; asks(rest) && waits < END_WAITS; waits++) {
        if (!may_wait_again(io_rings_wait(&rest->rings, SECOND_NS))) {
            break;
        }
        hear(rest);
    }
    io_rings_close(&rest->rings);
    memset(rest->asked, 0, sizeof rest->asked);
    rest->notified = true; /* whether the channel was opened is not known: of one that is open nothing is lost */
}

static void wait_by_rings(struct xen_ring *ring, bool open, uint64_t delay)
{
    struct xen_rest *rest = &ring->rest;

    ask(rest, SOURCE_WAKE, IORING_OP_READ, ring->wake_fd, &rest->woken, sizeof rest->woken);
    if (mover_in_flight(ring->mover) > 0) {
        ask(rest, SOURCE_MOVER, IORING_OP_POLL_ADD, mover_fd(ring->mover), NULL, 0);
    }
    if (open) {
        if (rest->notified) {
            open_channel(rest, ring->channel);
        }
        ask(rest, SOURCE_CHANNEL, IORING_OP_READ, xen_channel_fd(ring->channel), rest->said, sizeof rest->said);
    }
    int error = io_rings_wait(&rest->rings, delay);
    if (!hear(rest) || !may_wait_again(error)) {
        leave(rest);
    }
}

/* ---- either */

void xen_rest_begin(struct xen_ring *ring)
{
    struct io_rings *rings = &ring->rest.rings;

    if (ring->device->options.io_uring != 0 && !io_rings_open(rings, ENTRIES, BATCHED_COMPLETIONS, &USE) &&
        errno == EINVAL) {
        (void)io_rings_open(rings, ENTRIES, 0, &USE);
    }
}

void xen_rest_end(struct xen_ring *ring)
{
    if (ring->rest.rings.fd >= 0) {
        leave(&ring->rest);
    }
}

void xen_rest(struct xen_ring *ring, bool open, uint64_t delay)
{
    struct xen_rest *rest = &ring->rest;
    bool listens = open && delay == 0;

    rest->since = rate_limit_now();
    if (rest->rings.fd >= 0) {
        wait_by_rings(ring, listens, delay);
    } else {
        wait_by_poll(ring, listens, delay);
    }
    if (delay > 0) {
        xen_count(&ring->counters.throttled_ns, rate_limit_now() - rest->since);
    }
}
