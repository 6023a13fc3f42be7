/*
 * One ring and its thread: it takes requests, has them done, and publishes the responses (Xen's io/ring.h).
 *
 * The frontend shares the pages and may write anything there at any time. Only its producer index and its requests are
 * read, each once. Our own indices are never read back from the pages.
 */
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

static void end_ring(struct xen_ring *ring, const char *problem)
{
    ring->ended = true;
    xen_device_ended(ring->device, problem);
}

/* ---- requests */

static bool is_barrier(const struct xen_request *request)
{
    return request->operation == OPERATION_BARRIER ||
           (request->operation == OPERATION_FLUSH && request->segment_count > 0);
}

/* What it counts in the rate limit. Of an indirect request only the number of its pages is known yet. */
static uint64_t weight(const struct xen_request *request)
{
    return request->status != STATUS_OKAY              ? 0
           : request->operation == OPERATION_DISCARD   ? 0
           : request->indirect                         ? (uint64_t)request->segment_count * XEN_PAGE
                                                       : request->length;
}

static bool decode(struct xen_ring *ring, struct xen_request *request)
{
    request->status = xen_decode(ring->device->layout, &ring->served, ring->device->options.indirect_segments,
                                 xen_journal_bytes(ring, request), request);
    request->since = metrics_begin(xen_metric_of(request), request->offset, request->length);
    return request->status == STATUS_OKAY && is_barrier(request);
}

/* Take what there is, as far as a batch goes. `delay`: how long the limit says to wait with the rest. */
static void take(struct xen_ring *ring, uint64_t *delay)
{
    uint32_t produced = atomic_load_explicit(&xen_ring_indices(ring)->requests_produced, memory_order_acquire);
    uint32_t available = produced - ring->requests_taken;
    uint64_t bytes = 0;
    bool barrier = false;

    if (available > ring->entries - (ring->requests_taken - ring->responses_published)) {
        end_ring(ring, "the frontend has produced more requests than its ring holds");
        return;
    }
    while (available-- > 0 && bytes < BATCH_BYTES && ring->batch_count < BATCH_REQUESTS && !barrier) {
        *delay = rate_limit_delay(&ring->device->limit);
        if (*delay > 0) {
            break;
        }
        struct xen_request *request = ring->idle_requests;
        ring->idle_requests = request->next;
        memcpy(xen_journal_bytes(ring, request), xen_ring_slot(ring, ring->requests_taken),
               ring->device->layout->entry_bytes);
        /* From here on only the copy is looked at. */
        atomic_signal_fence(memory_order_seq_cst);
        xen_journal_take(ring, request, ring->requests_taken);
        ring->requests_taken++;
        ring->batch[ring->batch_count++] = request;
        barrier = decode(ring, request);
        bytes += weight(request);
        rate_limit_charge(&ring->device->limit, weight(request));
    }
    xen_journal_consumed(ring, ring->requests_taken);
}

static void accept_request(struct xen_ring *ring, struct xen_request *request)
{
    /* A predecessor that refused a barrier went on behind it, and was killed before it had published. */
    if (request->status == STATUS_OKAY && is_barrier(request) && ring->barrier != NULL) {
        request->status = STATUS_ERROR;
    }
    if (request->status != STATUS_OKAY) {
        xen_ring_answer(ring, request);
    } else if (is_barrier(request)) {
        ring->barrier = xen_transfer_new(ring, TAPFS_XEN_SYNC, request);
        ring->barrier->stage = STAGE_DRAIN;
    } else if (request->operation == OPERATION_FLUSH) {
        xen_move_sync(xen_transfer_new(ring, TAPFS_XEN_SYNC, request), STAGE_ONLY);
    } else if (request->operation == OPERATION_DISCARD && request->length > 0) {
        xen_park(xen_transfer_new(ring, TAPFS_XEN_DISCARD, request));
    } else if (request->operation == OPERATION_DISCARD) {
        xen_ring_answer(ring, request);
    } else {
        xen_move_add(ring, request);
    }
}

/* The requests of the batch are in the journal and decoded. */
static void accept_batch(struct xen_ring *ring)
{
    xen_fetch_segments(ring);
    for (uint32_t i = 0; i < ring->batch_count; i++) {
        accept_request(ring, ring->batch[i]);
    }
    xen_move_seal(ring);
    ring->batch_count = 0;
}

/* What a predecessor had taken and not answered. */
static void recover(struct xen_ring *ring)
{
    if (!xen_journal_recover(ring)) {
        ring->batch_count = 0;
        ring->requests_taken = ring->responses_published; /* nothing is in flight */
        end_ring(ring, "the ring is not where its journal says");
        return;
    }
    for (uint32_t i = 0; i < ring->batch_count; i++) {
        decode(ring, ring->batch[i]);
    }
    accept_batch(ring);
}

/* ---- the thread */

static void take_over_returned(struct xen_ring *ring)
{
    struct xen_transfer *transfer;

    if (!atomic_load(&ring->has_returned)) {
        return;
    }
    pthread_mutex_lock(&ring->returned_lock);
    struct xen_transfers returned = ring->returned;
    ring->returned = (struct xen_transfers){NULL, NULL};
    atomic_store(&ring->has_returned, false);
    pthread_mutex_unlock(&ring->returned_lock);
    while ((transfer = xen_pop(&returned)) != NULL) {
        xen_move_returned(transfer);
    }
}

/* Another disk is served from now on. */
static void take_over_served(struct xen_ring *ring)
{
    tapfs_xen *device = ring->device;

    if (atomic_load(&device->generation) == ring->generation) {
        return;
    }
    pthread_mutex_lock(&device->lock);
    ring->served = device->served;
    mover_set_disk(ring->mover, ring->served.disk);
    ring->generation = atomic_load(&device->generation);
    pthread_cond_broadcast(&device->settled);
    pthread_mutex_unlock(&device->lock);
}

/* Say so if there is nothing in flight, while the device is paused. */
static void settle(struct xen_ring *ring)
{
    tapfs_xen *device = ring->device;

    if (ring->requests_taken != ring->responses_published) {
        return;
    }
    pthread_mutex_lock(&device->lock);
    if (atomic_load(&device->paused) && !ring->quiet) {
        ring->quiet = true;
        pthread_cond_broadcast(&device->settled);
    }
    pthread_mutex_unlock(&device->lock);
}

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

    if (ring->watch_ns == 0 || mover_in_flight(ring->mover) > 0) {
        return false;
    }
    for (uint64_t end = rate_limit_now() + ring->watch_ns; rate_limit_now() < end;) {
        for (unsigned looks = 0; looks < WATCH_LOOKS; looks++) {
            if (atomic_load_explicit(&indices->requests_produced, memory_order_relaxed) != ring->requests_taken) {
                ring->watch_ns = minimum(2 * ring->watch_ns, WATCH_MAX_NS);
                return true;
            }
            if (atomic_load(&ring->has_returned) || atomic_load(&device->paused) || atomic_load(&device->stopping)) {
                return true;
            }
            processor_relax();
        }
    }
    /* In vain: the next look is shorter, and none follows the shortest until a sleep has been short. */
    ring->watch_ns = ring->watch_ns > WATCH_MIN_NS ? ring->watch_ns / 2 : 0;
    return false;
}

/* Wait for anything to do. `delay` in nanoseconds, 0: as long as it takes. */
static void rest(struct xen_ring *ring, bool open, uint64_t delay)
{
    const struct timespec timeout = {.tv_sec = (time_t)(delay / 1000000000u), .tv_nsec = (long)(delay % 1000000000u)};
    struct pollfd waits[3] = {
        {.fd = ring->wake_fd, .events = POLLIN},
        /* Nothing of the mover's ends while nothing is in flight, and to ask what it waits for costs as much as the rest. */
        {.fd = mover_in_flight(ring->mover) > 0 ? mover_fd(ring->mover) : -1, .events = POLLIN},
        {.fd = xen_channel_fd(ring->channel), .events = POLLIN},
    };
    uint64_t count, since = rate_limit_now();

    /* While nothing is taken the channel may stay readable. */
    int ready = ppoll(waits, open && delay == 0 ? 3 : 2, delay > 0 ? &timeout : NULL, NULL);
    if (delay > 0) {
        xen_count(&ring->counters.throttled_ns, rate_limit_now() - since);
    }
    if (ready <= 0) {
        return;
    }
    if (waits[0].revents != 0) {
        ssize_t got = read(ring->wake_fd, &count, sizeof count);
        (void)got; /* it is non-blocking */
    }
    if (waits[2].revents != 0) {
        ring->notified = true;
        if (rate_limit_now() - since < WATCH_MAX_NS) {
            ring->watch_ns = maximum(ring->watch_ns, WATCH_MIN_NS);
        }
    }
}

/* Whether there is nothing to take, and a notification will say when there is. */
static bool may_rest(struct xen_ring *ring)
{
    if (watch(ring)) {
        return false;
    }
    /* Not before: until then the channel stays masked, and what the frontend sends interrupts nobody. */
    if (ring->notified) {
        ring->notified = false;
        xen_channel_clear(ring->channel);
    }
    return !has_requests(ring);
}

/* Wait until all threads are there; false: they will not be. */
static bool released(tapfs_xen *device)
{
    pthread_mutex_lock(&device->lock);
    bool stopping = atomic_load(&device->stopping);
    pthread_mutex_unlock(&device->lock);
    return !stopping;
}

void *xen_ring_serve(void *argument)
{
    struct xen_ring *ring = argument;
    tapfs_xen *device = ring->device;

    if (!released(device)) {
        return NULL;
    }
    recover(ring);
    xen_move_run(ring);
    xen_ring_publish(ring);
    /* A predecessor may have published without notifying, and the frontend may have waited for us. */
    xen_count(&ring->counters.notifications, 1);
    xen_notify(ring->channel);
    while (!atomic_load(&device->stopping)) {
        uint64_t delay = 0;
        bool paused = atomic_load(&device->paused), busy;
        take_over_served(ring);
        take_over_returned(ring);
        xen_move_take_over(ring);
        if (!paused && !ring->ended && ring->barrier == NULL) {
            take(ring, &delay);
        }
        busy = ring->batch_count > 0;
        accept_batch(ring);
        xen_move_run(ring);
        busy |= xen_ring_publish(ring);
        xen_ring_count_in_flight(ring);
        if (paused) {
            settle(ring);
        }
        bool open = !paused && !ring->ended && ring->barrier == NULL;
        if (!busy && (!open || delay > 0 || may_rest(ring))) {
            rest(ring, open, delay);
        }
    }
    return NULL;
}
