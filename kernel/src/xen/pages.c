/*
 * The memory of a transfer: the frontend's pages, mapped for a while or for good, or a buffer that grant copies fill
 * and empty. Pages that cannot be mapped go through a buffer, too. The copy then finds out which are not granted.
 */
#include <errno.h>
#include <string.h>

#include "xen/internal.h"

static uint32_t collect_references(struct xen_transfer *transfer)
{
    uint32_t *references = transfer->ring->page_references, count = 0;
    for (const struct xen_request *request = transfer->first; request != NULL; request = request->next) {
        for (uint32_t i = 0; i < request->segment_count; i++) {
            references[count++] = request->segments[i].reference;
        }
    }
    return count;
}

static void set_move(struct xen_transfer *transfer, uint64_t offset, uint64_t length, const struct iovec *parts,
                     uint32_t part_count)
{
    transfer->move = (struct move){
        .offset = offset,
        .length = length,
        .parts = parts,
        .part_count = part_count,
        .writing = transfer->kind == TAPFS_XEN_WRITE,
        .context = transfer,
    };
}

static bool use_buffer(struct xen_transfer *transfer, uint64_t offset, uint64_t length)
{
    transfer->buffer = xen_buffers_take(&transfer->ring->buffers, length);
    if (transfer->buffer == NULL) {
        return false;
    }
    transfer->memory = MEMORY_BUFFER;
    transfer->buffer_bytes = length;
    transfer->whole = (struct iovec){.iov_base = transfer->buffer, .iov_len = length};
    set_move(transfer, offset, length, &transfer->whole, 1);
    return true;
}

/* Pages that lie side by side in our memory make one part. */
static void use_pages(struct xen_transfer *transfer, uint8_t *const *pages)
{
    struct iovec *parts = transfer->parts;
    uint32_t count = 0, page = 0;

    for (const struct xen_request *request = transfer->first; request != NULL; request = request->next) {
        for (uint32_t i = 0; i < request->segment_count; i++) {
            uint8_t *at = pages[page++] + request->segments[i].offset;
            if (count > 0 && (uint8_t *)parts[count - 1].iov_base + parts[count - 1].iov_len == at) {
                parts[count - 1].iov_len += request->segments[i].length;
            } else {
                parts[count++] = (struct iovec){.iov_base = at, .iov_len = request->segments[i].length};
            }
        }
    }
    set_move(transfer, transfer->offset, transfer->length, parts, count);
}

static bool map_pages(struct xen_transfer *transfer)
{
    struct xen_ring *ring = transfer->ring;
    uint32_t count = collect_references(transfer);

    /* The frontend's pages are written by a READ. */
    if (xen_map(ring->device->transport, ring->page_references, count, transfer->kind == TAPFS_XEN_READ,
                &transfer->mapping) != 0) {
        return false;
    }
    transfer->memory = MEMORY_MAPPED;
    for (uint32_t i = 0; i < count; i++) {
        ring->page_memory[i] = transfer->mapping.memory + (size_t)i * XEN_PAGE;
    }
    use_pages(transfer, ring->page_memory);
    return true;
}

/* A frontend that keeps its pages granted grants them for writing, whatever they are used for. */
static bool hold_pages(struct xen_transfer *transfer)
{
    struct xen_ring *ring = transfer->ring;
    uint32_t count = collect_references(transfer);

    if (xen_grants_hold(ring->grants, ring->page_references, count, true, ring->page_memory) != 0) {
        return false;
    }
    transfer->memory = MEMORY_HELD;
    use_pages(transfer, ring->page_memory);
    return true;
}

bool xen_pages_acquire(struct xen_transfer *transfer)
{
    uint32_t grants = transfer->ring->device->options.grants;

    if ((grants == TAPFS_XEN_MAP && map_pages(transfer)) || (grants == TAPFS_XEN_PERSISTENT && hold_pages(transfer))) {
        return true;
    }
    return use_buffer(transfer, transfer->offset, transfer->length);
}

bool xen_pages_borrow(struct xen_transfer *transfer)
{
    struct xen_ring *ring = transfer->ring;

    if (transfer->kind != TAPFS_XEN_READ || transfer->length < BORROWED_LEAST || transfer->by_buffer ||
        ring->borrowed_failures >= BORROWED_FAILURES || ring->device->options.grants != TAPFS_XEN_COPY) {
        return false;
    }
    set_move(transfer, transfer->offset, transfer->length, NULL, 0);
    const uint8_t *bytes = mover_lend(ring->mover, &transfer->move);
    if (bytes == NULL) {
        return false;
    }
    transfer->memory = MEMORY_LENT;
    transfer->buffer = (uint8_t *)(uintptr_t)bytes;
    return true;
}

void xen_pages_give_back(struct xen_transfer *transfer, bool taken)
{
    mover_passed(transfer->ring->mover, &transfer->move, taken ? (int32_t)transfer->length : -EFAULT);
    transfer->memory = MEMORY_NONE;
}

void xen_pages_release(struct xen_transfer *transfer)
{
    struct xen_ring *ring = transfer->ring;

    switch (transfer->memory) {
    case MEMORY_BUFFER:
        xen_buffers_return(&ring->buffers, transfer->buffer, transfer->buffer_bytes);
        break;
    case MEMORY_MAPPED:
        xen_unmap(ring->device->transport, &transfer->mapping);
        break;
    case MEMORY_HELD:
        xen_grants_release(ring->grants, ring->page_references, collect_references(transfer), true);
        break;
    case MEMORY_LENT: /* has been given back */
    case MEMORY_NONE:
        break;
    }
    transfer->memory = MEMORY_NONE;
}

bool xen_pages_gather(struct xen_transfer *transfer)
{
    struct xen_ring *ring = transfer->ring;
    uint64_t skip = transfer->move.outcome.done, left = transfer->move.length - skip;
    tapfs_outcome outcome = transfer->move.outcome;
    uint8_t *buffer = xen_buffers_take(&ring->buffers, left), *to = buffer;

    if (buffer == NULL) {
        return false;
    }
    for (uint32_t i = 0; i < transfer->move.part_count; i++) {
        const struct iovec *part = &transfer->move.parts[i];
        uint64_t here = minimum(skip, part->iov_len);
        memcpy(to, (const uint8_t *)part->iov_base + here, part->iov_len - here);
        to += part->iov_len - here;
        skip -= here;
    }
    xen_pages_release(transfer);
    transfer->memory = MEMORY_BUFFER;
    transfer->buffer = buffer;
    transfer->buffer_bytes = left;
    transfer->whole = (struct iovec){.iov_base = buffer, .iov_len = left};
    set_move(transfer, transfer->move.offset + outcome.done, left, &transfer->whole, 1);
    transfer->move.outcome = outcome;
    transfer->move.outcome.done = 0;
    return true;
}

/* ---- grant copies, of many requests at once */

bool xen_pieces_fit(const struct xen_transfer *transfer)
{
    return transfer->ring->piece_count + transfer->segment_count <= PIECES_MAX;
}

void xen_pieces_add(struct xen_transfer *transfer)
{
    struct xen_ring *ring = transfer->ring;
    uint8_t *local = transfer->buffer;

    for (struct xen_request *request = transfer->first; request != NULL; request = request->next) {
        for (uint32_t i = 0; i < request->segment_count; i++) {
            const struct xen_segment *segment = &request->segments[i];
            ring->owners[ring->piece_count] = request;
            ring->pieces[ring->piece_count++] = (struct xen_copy){
                .local = local,
                .reference = segment->reference,
                .offset = segment->offset,
                .length = segment->length,
                .may_vanish = transfer->memory == MEMORY_LENT,
            };
            local += segment->length;
        }
    }
}

void xen_pieces_copy(struct xen_ring *ring, bool to_frontend)
{
    uint32_t count = ring->piece_count;

    ring->piece_count = 0;
    if (count == 0 || xen_copy(ring->device->transport, ring->pieces, count, to_frontend) == 0) {
        return;
    }
    for (uint32_t i = 0; i < count; i++) {
        if (ring->pieces[i].error != 0) {
            ring->owners[i]->status = STATUS_ERROR;
        }
    }
}

/* ---- the segments of indirect requests */

/* From a page that stays mapped; false: it does not. */
static bool read_held(struct xen_ring *ring, struct xen_request *request)
{
    uint8_t *page;
    if (ring->grants == NULL || xen_grants_hold(ring->grants, &request->reference, 1, true, &page) != 0) {
        return false;
    }
    memcpy(request->segments, page, (size_t)request->segment_count * SEGMENT_BYTES);
    xen_grants_release(ring->grants, &request->reference, 1, true);
    return true;
}

void xen_fetch_segments(struct xen_ring *ring)
{
    for (uint32_t i = 0; i < ring->batch_count; i++) {
        struct xen_request *request = ring->batch[i];
        if (request->indirect && request->status == STATUS_OKAY && !read_held(ring, request)) {
            ring->owners[ring->piece_count] = request;
            ring->pieces[ring->piece_count++] = (struct xen_copy){
                .local = (uint8_t *)request->segments,
                .reference = request->reference,
                .length = (uint16_t)(request->segment_count * SEGMENT_BYTES),
            };
        }
    }
    xen_pieces_copy(ring, false);
    /* The frontend cannot change them any more. */
    atomic_signal_fence(memory_order_seq_cst);
    for (uint32_t i = 0; i < ring->batch_count; i++) {
        struct xen_request *request = ring->batch[i];
        if (request->indirect && request->status == STATUS_OKAY) {
            request->status = xen_decode_segments(&ring->served, (const uint8_t *)request->segments, request);
        }
    }
}
