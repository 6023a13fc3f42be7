/*
 * The thread of a virtqueue: it takes requests, has them done, and shows the guest the answers.
 *
 * The thread waits for the guest's kick, its mover and what other threads give back. Answers of requests that end at once
 * are shown together. The kick is watched for edges, so that it need not be read: a kick that comes while the thread is
 * busy is an edge, too, and a ring is looked at once more after the guest was asked for a kick.
 */
#include <sys/epoll.h>

#include "vhost/internal.h"

#define EVENTS 8
#define MILLISECOND_NS 1000000u
#define PATIENCE_MAX_MS 10000u

/* ---- requests */

static bool takes(const struct vhost_queue *queue)
{
    return !atomic_load(&queue->stopping) && atomic_load(&queue->device->problems[queue->index]) == NULL;
}

/* Do the request of a head that was taken and marked. */
static void begin(struct vhost_queue *queue, uint16_t head)
{
    struct vhost_request *request = &queue->requests[head];

    *request = (struct vhost_request){
        .queue = queue,
        .head = head,
        .busy = true,
        .parts = request->parts,
        .part_room = request->part_room,
    };
    queue->in_flight++;
    switch (vhost_decode(queue, request)) {
    case DECODED:
        vhost_request_begin(request);
        break;
    case DECODED_NO_MEMORY:
        request->since = metrics_begin(vhost_metric_of(request->type), 0, 0);
        request->status = STATUS_IOERR;
        vhost_queue_answer(request);
        break;
    default:
        vhost_queue_forget(request);
        vhost_queue_fail(queue, "made a request whose descriptors make no sense");
    }
}

static bool is_free(const struct vhost_queue *queue, uint16_t head)
{
    return head < queue->vring.entries && !queue->requests[head].busy;
}

/* Take what waits, as far as the limit allows. Nanoseconds until it allows the next one; 0: nothing waits for that. */
static uint64_t take_all(struct vhost_queue *queue)
{
    uint32_t waiting;
    uint64_t delay;

    vhost_vring_ask_not(&queue->vring);
    while (takes(queue) && (waiting = vhost_vring_waiting(&queue->vring)) > 0) {
        if (waiting > queue->vring.entries) {
            vhost_queue_fail(queue, "offered more requests than its ring has entries");
            return 0;
        }
        for (uint32_t i = 0; i < waiting && takes(queue); i++) {
            delay = rate_limit_delay(&queue->device->limit);
            if (delay > 0) {
                return delay;
            }
            uint16_t head = vhost_vring_take(&queue->vring);
            if (!is_free(queue, head)) {
                vhost_queue_fail(queue, "offered a descriptor that is in use already, or that there is not");
                return 0;
            }
            vhost_track_taken(&queue->track, head);
            begin(queue, head);
            if (queue->batched >= BATCH_REQUESTS) {
                vhost_queue_publish(queue);
            }
        }
    }
    return 0;
}

/* What a predecessor had taken. Its answers may have been shown without a notification, so the guest gets one. */
static void redo(struct vhost_queue *queue)
{
    for (uint32_t i = 0; i < queue->left_count && takes(queue); i++) {
        vhost_count(&queue->device->counters.redone, 1);
        begin(queue, queue->left[i]);
    }
    vhost_queue_publish(queue);
    vhost_queue_notify(queue);
}

/* ---- the thread */

/* With a `delay` in nanoseconds at most for so long. */
static void wait_for_something(struct vhost_queue *queue, uint64_t delay)
{
    struct epoll_event events[EVENTS];
    uint64_t since = delay > 0 ? rate_limit_now() : 0;
    /* A whole millisecond more is no loss: the limit forgives as much. */
    int patience = delay > 0 ? (int)minimum(delay / MILLISECOND_NS + 1, PATIENCE_MAX_MS) : -1;
    int count = epoll_wait(queue->epoll_fd, events, EVENTS, patience);

    if (delay > 0) {
        vhost_count(&queue->device->counters.throttled_ns, rate_limit_now() - since);
    }
    vhost_count(&queue->device->counters.kicks, 1);
    for (int i = 0; i < count; i++) {
        if (events[i].data.ptr == &queue->wake_fd) {
            vhost_requests_returned(queue);
        } else if (events[i].data.ptr == &queue->mover) {
            vhost_requests_moved(queue);
        }
    }
}

void *vhost_queue_serve(void *argument)
{
    struct vhost_queue *queue = argument;

    redo(queue);
    for (;;) {
        uint64_t delay = take_all(queue);
        if (atomic_load_explicit(&queue->device->memory.gone, memory_order_relaxed)) {
            vhost_queue_fail(queue, NULL);
        }
        vhost_queue_publish(queue);
        mover_submit(queue->mover);
        if (atomic_load(&queue->stopping) && queue->in_flight == 0) {
            break;
        }
        vhost_vring_ask(&queue->vring);
        vhost_log_ring(queue);
        if (delay > 0 || !takes(queue) || vhost_vring_waiting(&queue->vring) == 0) {
            wait_for_something(queue, takes(queue) ? delay : 0);
        }
    }
    vhost_log_ring(queue);
    return NULL;
}
