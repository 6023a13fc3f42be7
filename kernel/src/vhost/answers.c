/* Answers of a virtqueue: written as requests end, and shown to the guest together; and what ends it. */
#include <stdlib.h>
#include <sys/eventfd.h>

#include "vhost/internal.h"

uint32_t vhost_metric_of(uint32_t type)
{
    switch (type) {
    case TYPE_IN:
        return TAPFS_METRIC_READ;
    case TYPE_OUT:
        return TAPFS_METRIC_WRITE;
    case TYPE_FLUSH:
        return TAPFS_METRIC_FLUSH;
    case TYPE_DISCARD:
        return TAPFS_METRIC_DISCARD;
    case TYPE_WRITE_ZEROES:
        return TAPFS_METRIC_ZERO;
    default:
        return TAPFS_METRIC_OTHER;
    }
}

static void count_answer(const struct vhost_request *request)
{
    tapfs_vhost *device = request->queue->device;
    struct vhost_counters *counters = &device->counters;

    metrics_end(&device->metrics, vhost_metric_of(request->type), request->since, request->done,
                request->status != STATUS_OK);

    if (request->status != STATUS_OK) {
        vhost_count(&counters->errors, 1);
    }
    switch (request->type) {
    case TYPE_IN:
        vhost_count(&counters->reads, 1);
        vhost_count(&counters->read_bytes, request->done);
        break;
    case TYPE_OUT:
        vhost_count(&counters->writes, 1);
        vhost_count(&counters->written_bytes, request->done);
        break;
    case TYPE_FLUSH:
        vhost_count(&counters->flushes, 1);
        break;
    case TYPE_DISCARD:
        vhost_count(&counters->discards, 1);
        break;
    case TYPE_WRITE_ZEROES:
        vhost_count(&counters->zeroes, 1);
        break;
    default:
        break;
    }
}

void vhost_queue_forget(struct vhost_request *request)
{
    struct vhost_queue *queue = request->queue;

    if (request->gathered.iov_base != NULL) {
        queue->gathered -= request->gathered.iov_len;
        free(request->gathered.iov_base);
        request->gathered = (struct iovec){.iov_base = NULL};
    }
    free(request->ranges);
    request->ranges = NULL;
    request->busy = false;
    queue->in_flight--;
}

void vhost_queue_answer(struct vhost_request *request)
{
    struct vhost_queue *queue = request->queue;

    count_answer(request);
    *request->status_at = request->status;
    vhost_log_memory(queue, request->status_at, sizeof *request->status_at);
    vhost_vring_answer(&queue->vring, request->head, request->written + 1);
    vhost_track_answered(&queue->track, request->head);
    queue->batch[queue->batched++] = request->head;
    vhost_queue_forget(request);
}

void vhost_queue_notify(struct vhost_queue *queue)
{
    pthread_mutex_lock(&queue->call_lock);
    if (queue->call_fd >= 0) {
        eventfd_write(queue->call_fd, 1);
    }
    pthread_mutex_unlock(&queue->call_lock);
    vhost_count(&queue->device->counters.notifications, 1);
}

void vhost_queue_publish(struct vhost_queue *queue)
{
    if (queue->batched == 0) {
        return;
    }
    bool wanted = vhost_vring_publish(&queue->vring);
    vhost_log_ring(queue);
    vhost_track_published(&queue->track, queue->batch, queue->batched, queue->vring.published);
    queue->batched = 0;
    if (wanted) {
        vhost_queue_notify(queue);
    }
}

void vhost_queue_fail(struct vhost_queue *queue, const char *problem)
{
    const char *none = NULL;

    if (atomic_load(&queue->device->memory.gone)) {
        problem = "lost its memory: a file of it became shorter"; /* whatever was read of it since */
    }
    if (atomic_compare_exchange_strong(&queue->device->problems[queue->index], &none, problem)) {
        eventfd_write(queue->device->problem_fd, 1);
        if (queue->error_fd >= 0) {
            eventfd_write(queue->error_fd, 1);
        }
    }
}
