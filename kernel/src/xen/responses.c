/* Responses: put into the ring one by one, published to the frontend in batches. */
#include <string.h>

#include "xen/internal.h"

/* A response, the same in every protocol up to here; the ABIs pad it differently. */
struct response {
    uint64_t id;
    uint8_t operation, padding;
    int16_t status;
};
#define RESPONSE_BYTES 12u

uint32_t xen_metric_of(const struct xen_request *request)
{
    switch (request->operation) {
    case OPERATION_READ:
        return TAPFS_METRIC_READ;
    case OPERATION_WRITE:
    case OPERATION_BARRIER:
        return TAPFS_METRIC_WRITE;
    case OPERATION_FLUSH:
        return TAPFS_METRIC_FLUSH;
    case OPERATION_DISCARD:
        return TAPFS_METRIC_DISCARD;
    default:
        return TAPFS_METRIC_OTHER;
    }
}

void xen_ring_answer(struct xen_ring *ring, struct xen_request *request)
{
    struct response response = {.id = request->id, .operation = request->operation, .status = request->status};
    struct xen_counters *counters = &ring->counters;

    /* This slot's request has been taken: responses never come before requests. */
    memcpy(xen_ring_slot(ring, ring->responses_written), &response, RESPONSE_BYTES);
    xen_journal_answer(ring, request, ring->responses_written);
    ring->responses_written++;
    request->next = ring->answered;
    ring->answered = request;

    metrics_end(&ring->device->metrics, xen_metric_of(request), request->since,
                request->operation == OPERATION_DISCARD ? 0 : request->length, request->status != STATUS_OKAY);
    if (request->operation <= OPERATION_DISCARD) {
        xen_count(&counters->operations[request->operation], 1);
    }
    if (request->status != STATUS_OKAY) {
        xen_count(&counters->errors, 1);
    } else if (request->operation == OPERATION_READ) {
        xen_count(&counters->read_bytes, request->length);
    } else if (request->operation != OPERATION_DISCARD) {
        xen_count(&counters->written_bytes, request->length);
    }
}

void xen_ring_count_in_flight(struct xen_ring *ring)
{
    atomic_store_explicit(&ring->counters.in_flight, ring->requests_taken - ring->responses_written,
                          memory_order_relaxed);
}

bool xen_ring_publish(struct xen_ring *ring)
{
    struct ring_indices *indices = xen_ring_indices(ring);
    uint32_t written = ring->responses_written, count = written - ring->responses_published;

    if (count == 0) {
        return false;
    }
    xen_count(&ring->counters.batches, 1);
    xen_ring_count_in_flight(ring);
    /* We store our index and load the event's, the frontend stores the event's and loads ours, both in full order: one
     * of us sees the other. */
    atomic_store(&indices->responses_produced, written);
    uint32_t event = atomic_load(&indices->responses_event);
    ring->responses_published = written;
    while (ring->answered != NULL) {
        struct xen_request *request = ring->answered;
        ring->answered = request->next;
        xen_journal_free(ring, request);
        request->next = ring->idle_requests;
        ring->idle_requests = request;
    }
    if (ring->barrier_answered) {
        /* Not before: a successor must not find it among what came after it. */
        ring->barrier_answered = false;
        ring->barrier = NULL;
    }
    if (written - event < count) {
        xen_count(&ring->counters.notifications, 1);
        xen_notify(ring->channel);
    }
    return true;
}
