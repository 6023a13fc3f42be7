/*
 * Requests of a guest, decoded: a chain of descriptors, and in the memory that it names a request of virtio-blk (virtio
 * 1.2, 2.7.5 and 5.2.6). Each descriptor is copied before it is looked at, so the guest cannot change it in between.
 */
#include <endian.h>
#include <stdlib.h>
#include <string.h>

#include "vhost/internal.h"

/* The memory of a chain, and how far it is walked. */
struct chain {
    struct vhost_queue *queue;
    uint32_t readable, writable; /* pieces of queue->readable and queue->writable */
    uint64_t readable_bytes, writable_bytes;
};

static struct vring_descriptor copied(const struct vring_descriptor *at)
{
    struct vring_descriptor descriptor;
    memcpy(&descriptor, at, sizeof descriptor);
    /* What was copied is what is checked: the compiler may not look there again. */
    __asm__ volatile("" : "+m"(descriptor));
    return (struct vring_descriptor){
        .address = le64toh(descriptor.address),
        .length = le32toh(descriptor.length),
        .flags = le16toh(descriptor.flags),
        .next = le16toh(descriptor.next),
    };
}

/* Copy from the guest's memory; false: it is not there. */
static bool copy_in(struct vhost_queue *queue, uint64_t address, void *to, uint64_t length)
{
    uint8_t *target = to;
    while (length > 0) {
        uint64_t count = length;
        const uint8_t *from = vhost_guest_memory(&queue->device->memory, address, &count, &queue->region);
        if (from == NULL) {
            return false;
        }
        memcpy(target, from, count);
        target += count;
        address += count;
        length -= count;
    }
    return true;
}

/* The memory of a descriptor, which may lie in several regions. */
static bool add_memory(struct chain *chain, const struct vring_descriptor *descriptor)
{
    struct vhost_queue *queue = chain->queue;
    bool writable = (descriptor->flags & DESCRIPTOR_WRITE) != 0;
    struct iovec *parts = writable ? queue->writable : queue->readable;
    uint32_t *count = writable ? &chain->writable : &chain->readable;
    uint64_t address = descriptor->address, left = descriptor->length;

    if (!writable && chain->writable > 0) {
        return false; /* what the device reads comes first */
    }
    *(writable ? &chain->writable_bytes : &chain->readable_bytes) += left;
    while (left > 0) {
        uint64_t length = left;
        uint8_t *memory = vhost_guest_memory(&queue->device->memory, address, &length, &queue->region);
        if (memory == NULL || *count == PARTS_MAX) {
            return false;
        }
        parts[(*count)++] = (struct iovec){.iov_base = memory, .iov_len = length};
        address += length;
        left -= length;
    }
    return true;
}

/* Copy a table of indirect descriptors; the number of them, 0 if there is none such. */
static uint32_t copy_table(struct vhost_queue *queue, const struct vring_descriptor *descriptor)
{
    uint32_t count = descriptor->length / (uint32_t)sizeof *descriptor;

    if (!queue->indirect || (descriptor->flags & (DESCRIPTOR_NEXT | DESCRIPTOR_WRITE)) != 0 || count == 0 ||
        count > DESCRIPTORS_MAX || descriptor->length % sizeof *descriptor != 0 ||
        !copy_in(queue, descriptor->address, queue->table, descriptor->length)) {
        return 0;
    }
    return count;
}

static bool walk(struct chain *chain, uint16_t head)
{
    struct vhost_queue *queue = chain->queue;
    const struct vring_descriptor *table = queue->vring.descriptors;
    uint32_t entries = queue->vring.entries, at = head, steps = 0;

    for (;;) {
        /* A chain that is longer than its table is a circle. */
        if (at >= entries || steps++ == entries) {
            return false;
        }
        struct vring_descriptor descriptor = copied(&table[at]);
        if ((descriptor.flags & DESCRIPTOR_INDIRECT) != 0) {
            entries = table == queue->table ? 0 : copy_table(queue, &descriptor);
            table = queue->table;
            at = steps = 0;
            continue;
        }
        if (!add_memory(chain, &descriptor)) {
            return false;
        }
        if ((descriptor.flags & DESCRIPTOR_NEXT) == 0) {
            return true;
        }
        at = descriptor.next;
    }
}

/* ---- the request */

/* Copy so many bytes from the start of pieces of memory, and take them off. There are so many. */
static void take_front(struct iovec **parts, uint32_t *count, void *to, size_t length)
{
    uint8_t *target = to;
    while (length > 0) {
        struct iovec *part = *parts;
        size_t taken = part->iov_len < length ? part->iov_len : length;
        memcpy(target, part->iov_base, taken);
        target += taken;
        length -= taken;
        part->iov_base = (uint8_t *)part->iov_base + taken;
        part->iov_len -= taken;
        if (part->iov_len == 0) {
            (*parts)++;
            (*count)--;
        }
    }
}

static bool keep_parts(struct vhost_request *request, const struct iovec *parts, uint32_t count)
{
    if (count > request->part_room) {
        struct iovec *room = realloc(request->parts, count * sizeof *room);
        if (room == NULL) {
            return false;
        }
        request->parts = room;
        request->part_room = count;
    }
    if (count > 0) {
        memcpy(request->parts, parts, count * sizeof *parts);
    }
    request->part_count = count;
    return true;
}

static bool in_disk(const tapfs_vhost *device, uint64_t sector, uint64_t length)
{
    return sector <= device->size / SECTOR_BYTES && length <= device->size - sector * SECTOR_BYTES;
}

static enum vhost_decoded decode_move(struct vhost_request *request, uint64_t sector, const struct iovec *parts,
                                      uint32_t count, uint64_t length)
{
    const tapfs_vhost *device = request->queue->device;
    bool writing = request->type == TYPE_OUT;

    request->kind = writing ? TAPFS_VHOST_WRITE : TAPFS_VHOST_READ;
    if (length % SECTOR_BYTES != 0 || length > REQUEST_BYTES_MAX || !in_disk(device, sector, length) ||
        (writing && !device->writable)) {
        request->status = STATUS_IOERR;
        return DECODED;
    }
    request->offset = sector * SECTOR_BYTES;
    request->length = length;
    return keep_parts(request, parts, count) ? DECODED : DECODED_NO_MEMORY;
}

struct zeroes_range {
    uint64_t sector;
    uint32_t sectors, flags;
};

static uint8_t decode_range(const struct vhost_request *request, const struct zeroes_range *asked,
                            struct vhost_range *range)
{
    uint64_t sector = le64toh(asked->sector), length = (uint64_t)le32toh(asked->sectors) * SECTOR_BYTES;
    uint32_t flags = le32toh(asked->flags), known = request->type == TYPE_WRITE_ZEROES ? ZEROES_UNMAP : 0;

    if ((flags & ~known) != 0) {
        return STATUS_UNSUPPORTED;
    }
    if (length > TAPFS_VHOST_ZEROES_MAX || !in_disk(request->queue->device, sector, length)) {
        return STATUS_IOERR;
    }
    *range = (struct vhost_range){
        .offset = sector * SECTOR_BYTES,
        .length = length,
        .kind = request->type == TYPE_DISCARD      ? TAPFS_VHOST_DISCARD
                : (flags & ZEROES_UNMAP) != 0      ? TAPFS_VHOST_ZERO
                                                   : TAPFS_VHOST_FILL,
    };
    return STATUS_OK;
}

static enum vhost_decoded decode_ranges(struct vhost_request *request, struct iovec *parts, uint32_t count,
                                        uint64_t length)
{
    struct zeroes_range asked;
    uint64_t ranges = length / sizeof asked;

    if (!request->queue->device->writable || length % sizeof asked != 0 || ranges == 0 ||
        ranges > TAPFS_VHOST_RANGES_MAX) {
        request->status = STATUS_IOERR;
        return DECODED;
    }
    request->ranges = calloc(ranges, sizeof *request->ranges);
    if (request->ranges == NULL) {
        return DECODED_NO_MEMORY;
    }
    for (uint32_t i = 0; i < ranges && request->status == STATUS_OK; i++) {
        take_front(&parts, &count, &asked, sizeof asked);
        request->status = decode_range(request, &asked, &request->ranges[i]);
    }
    request->range_count = (uint32_t)ranges;
    return DECODED;
}

static void write_id(struct vhost_request *request, const struct iovec *parts, uint32_t count)
{
    const char *id = request->queue->device->id;
    size_t left = TAPFS_VHOST_ID_BYTES;

    for (uint32_t i = 0; i < count && left > 0; i++) {
        size_t length = parts[i].iov_len < left ? parts[i].iov_len : left;
        memcpy(parts[i].iov_base, id, length);
        vhost_log_memory(request->queue, parts[i].iov_base, length);
        id += length;
        left -= length;
    }
    request->written = TAPFS_VHOST_ID_BYTES - (uint32_t)left;
}

enum vhost_decoded vhost_decode(struct vhost_queue *queue, struct vhost_request *request)
{
    struct chain chain = {.queue = queue};
    struct {
        uint32_t type, priority;
        uint64_t sector;
    } header;

    if (!walk(&chain, request->head) || chain.readable_bytes < sizeof header || chain.writable_bytes == 0) {
        return DECODED_NONSENSE;
    }
    struct iovec *readable = queue->readable, *writable = queue->writable;
    take_front(&readable, &chain.readable, &header, sizeof header);
    struct iovec *last = &writable[chain.writable - 1];
    request->status_at = (uint8_t *)last->iov_base + --last->iov_len;
    chain.writable -= last->iov_len == 0;
    request->status = STATUS_OK;
    request->type = le32toh(header.type);
    uint64_t sector = le64toh(header.sector), out = chain.readable_bytes - sizeof header;

    switch (request->type) {
    case TYPE_IN:
        return decode_move(request, sector, writable, chain.writable, chain.writable_bytes - 1);
    case TYPE_OUT:
        return decode_move(request, sector, readable, chain.readable, out);
    case TYPE_FLUSH:
        request->kind = TAPFS_VHOST_SYNC;
        return DECODED;
    case TYPE_GET_ID:
        write_id(request, writable, chain.writable);
        return DECODED;
    case TYPE_DISCARD:
    case TYPE_WRITE_ZEROES:
        return decode_ranges(request, readable, chain.readable, out);
    default:
        request->status = STATUS_UNSUPPORTED;
        return DECODED;
    }
}
