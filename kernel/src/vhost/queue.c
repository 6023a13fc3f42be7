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

static void take_all(struct vhost_queue *queue)
{
    uint32_t waiting;

    vhost_vring_ask_not(&queue->vring);
    while (takes(queue) && (waiting = vhost_vring_waiting(&queue->vring)) > 0) {
        if (waiting > queue->vring.entries) {
            vhost_queue_fail(queue, "offered more requests than its ring has entries");
            return;
        }
        for (uint32_t i = 0; i < waiting && takes(queue); i++) {
            uint16_t head = vhost_vring_take(&queue->vring);
            if (!is_free(queue, head)) {
                vhost_queue_fail(queue, "offered a descriptor that is in use already, or that there is not");
                return;
            }
            vhost_track_taken(&queue->track, head);
            begin(queue, head);
            if (queue->batched >= BATCH_REQUESTS) {
                vhost_queue_publish(queue);
            }
        }
    }
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

static void wait_for_something(struct vhost_queue *queue)
{
    struct epoll_event events[EVENTS];
    int count = epoll_wait(queue->epoll_fd, events, EVENTS, -1);

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
        take_all(queue);
        if (atomic_load_explicit(&queue->device->memory.gone, memory_order_relaxed)) {
            vhost_queue_fail(queue, NULL);
        }
        vhost_queue_publish(queue);
        mover_submit(queue->mover);
        if (atomic_load(&queue->stopping) && queue->in_flight == 0) {
            break;
        }
        vhost_vring_ask(&queue->vring);
        if (!takes(queue) || vhost_vring_waiting(&queue->vring) == 0) {
            wait_for_something(queue);
        }
    }
    return NULL;
}
