/*
 * Decode and check requests of the three ABIs (Xen's io/blkif.h). The bytes are a copy of ours, and nothing in them is
 * trusted.
 */
#include <string.h>

#include "xen/internal.h"

/* The ABIs differ in how they align 64-bit numbers. */
static const struct xen_layout aligned_to_8 = {
    .entry_bytes = 112, .id = 8, .sector = 16, .segments = 24, .sector_count = 24, .reference = 28};
static const struct xen_layout aligned_to_4 = {
    .entry_bytes = 108, .id = 4, .sector = 12, .segments = 20, .sector_count = 20, .reference = 24};

const struct xen_layout *xen_layout(uint32_t protocol)
{
    switch (protocol) {
    case TAPFS_XEN_NATIVE:
        return _Alignof(struct { uint64_t number; }) == 8 ? &aligned_to_8 : &aligned_to_4;
    case TAPFS_XEN_X86_64:
        return &aligned_to_8;
    case TAPFS_XEN_X86_32:
        return &aligned_to_4;
    default:
        return NULL;
    }
}

static uint16_t get_16(const uint8_t *bytes)
{
    uint16_t value;
    memcpy(&value, bytes, sizeof value);
    return value;
}

static uint32_t get_32(const uint8_t *bytes)
{
    uint32_t value;
    memcpy(&value, bytes, sizeof value);
    return value;
}

static uint64_t get_64(const uint8_t *bytes)
{
    uint64_t value;
    memcpy(&value, bytes, sizeof value);
    return value;
}

/* The range in bytes, if it lies within the disk. */
static bool set_range(const struct xen_served *served, uint64_t sector, uint64_t count, struct xen_request *request)
{
    if (sector > served->sectors || count > served->sectors - sector) {
        return false;
    }
    request->offset = sector * XEN_SECTOR_BYTES;
    request->length = count * XEN_SECTOR_BYTES;
    return true;
}

int16_t xen_decode_segments(const struct xen_served *served, const uint8_t *bytes, struct xen_request *request)
{
    uint64_t sectors = 0;

    for (uint32_t i = 0; i < request->segment_count; i++) {
        const uint8_t *segment = bytes + i * SEGMENT_BYTES;
        uint32_t reference = get_32(segment);
        unsigned first = segment[4], last = segment[5];
        if (first > last || last >= XEN_PAGE / XEN_SECTOR_BYTES) {
            return STATUS_ERROR;
        }
        /* `bytes` may be the same memory: a decoded segment takes as much. */
        request->segments[i] = (struct xen_segment){
            .reference = reference,
            .offset = (uint16_t)(first * XEN_SECTOR_BYTES),
            .length = (uint16_t)((last - first + 1) * XEN_SECTOR_BYTES),
        };
        sectors += last - first + 1;
    }
    return set_range(served, request->offset / XEN_SECTOR_BYTES, sectors, request) ? STATUS_OKAY : STATUS_ERROR;
}

/* Where it starts, for xen_decode_segments; so far only that its bytes can be counted. */
static bool set_start(const struct xen_served *served, uint64_t sector, struct xen_request *request)
{
    return set_range(served, sector, 0, request);
}

static int16_t decode_indirect(const struct xen_layout *layout, const struct xen_served *served,
                               uint32_t indirect_segments, const uint8_t *bytes, struct xen_request *request)
{
    uint32_t count = get_16(bytes + 2);

    request->operation = bytes[1];
    if (indirect_segments == 0) {
        return STATUS_UNSUPPORTED;
    }
    if (request->operation != OPERATION_READ && request->operation != OPERATION_WRITE) {
        return STATUS_ERROR;
    }
    if (count == 0 || count > indirect_segments || !set_start(served, get_64(bytes + layout->sector), request) ||
        (request->operation == OPERATION_WRITE && !served->writable)) {
        return STATUS_ERROR;
    }
    request->indirect = true;
    request->reference = get_32(bytes + layout->reference);
    request->segment_count = count;
    return STATUS_OKAY;
}

static int16_t decode_discard(const struct xen_layout *layout, const struct xen_served *served, const uint8_t *bytes,
                              struct xen_request *request)
{
    if (!served->discard || !served->writable) {
        return STATUS_UNSUPPORTED;
    }
    /* The flag asks for a secure discard, which is not offered and then means nothing. */
    return set_range(served, get_64(bytes + layout->sector), get_64(bytes + layout->sector_count), request)
               ? STATUS_OKAY
               : STATUS_ERROR;
}

static int16_t decode_direct(const struct xen_layout *layout, const struct xen_served *served, const uint8_t *bytes,
                             struct xen_request *request)
{
    bool may_be_empty = request->operation == OPERATION_BARRIER || request->operation == OPERATION_FLUSH;
    uint32_t count = bytes[1];

    if (request->operation != OPERATION_READ && !served->writable) {
        return may_be_empty && count == 0 ? STATUS_UNSUPPORTED : STATUS_ERROR;
    }
    if (count > DIRECT_SEGMENTS || (count == 0 && !may_be_empty)) {
        return STATUS_ERROR;
    }
    if (count == 0) {
        return STATUS_OKAY; /* the sector of an empty flush is anything, often all ones */
    }
    if (!set_start(served, get_64(bytes + layout->sector), request)) {
        return STATUS_ERROR;
    }
    request->segment_count = count;
    return xen_decode_segments(served, bytes + layout->segments, request);
}

int16_t xen_decode(const struct xen_layout *layout, const struct xen_served *served, uint32_t indirect_segments,
                   const uint8_t *bytes, struct xen_request *request)
{
    request->id = get_64(bytes + layout->id);
    request->operation = bytes[0];
    request->offset = request->length = 0;
    request->segment_count = 0;
    request->indirect = false;
    switch (request->operation) {
    case OPERATION_READ:
    case OPERATION_WRITE:
    case OPERATION_BARRIER:
    case OPERATION_FLUSH:
        return decode_direct(layout, served, bytes, request);
    case OPERATION_DISCARD:
        return decode_discard(layout, served, bytes, request);
    case OPERATION_INDIRECT:
        return decode_indirect(layout, served, indirect_segments, bytes, request);
    default:
        return STATUS_UNSUPPORTED;
    }
}
