/* Write to the places that the driver has reserved, and make such places read as zeros. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "engine/internal.h"

/* Fills up to this many bytes travel with the data in one write. */
#define GATHERED_FILL_MAX (128u << 10)
#define RUNS_AT_ONCE 8

static bool placement_valid(const struct layer *layer, const tapfs_placement *placement)
{
    return placement->length > 0 && placement->file < layer->file_count &&
           in_host_range(placement->offset, placement->length) &&
           in_host_range(placement->host_offset, placement->length) &&
           (layer->cipher == NULL || placement->offset % layer->geometry.cipher.sector_bytes == 0);
}

static uint64_t end_of(const tapfs_placement *placement)
{
    return placement->offset + placement->length;
}

static bool placements_valid(const struct layer *layer, const tapfs_placement *placements, size_t count)
{
    uint64_t end = 0;
    for (size_t i = 0; i < count; i++) {
        if (!placement_valid(layer, &placements[i]) || placements[i].offset < end) {
            return false;
        }
        end = end_of(&placements[i]);
    }
    return true;
}

static bool placements_cover(const tapfs_placement *placements, size_t count, const tapfs_range *ranges,
                             size_t range_count)
{
    size_t next = 0;
    for (size_t i = 0; i < range_count; i++) {
        uint64_t at = ranges[i].offset, end = at + ranges[i].length;
        while (at < end) {
            while (next < count && end_of(&placements[next]) <= at) {
                next++;
            }
            if (next == count || placements[next].offset > at) {
                return false;
            }
            at = end_of(&placements[next]);
        }
    }
    return true;
}

/* ---- one placement, and the segments that touch it */

struct place {
    struct request *request;
    const tapfs_placement *placement;
    const tapfs_segment *segments;
    size_t count;
};

/* A part of a segment: bytes [start, stop) of the disk; empty where `start` is `stop`. */
struct part {
    uint64_t start, stop;
    const uint8_t *data;
};

/* What a segment has between `from`, which lies at or before its end, and `to`. */
static struct part part_between(const tapfs_segment *segment, uint64_t from, uint64_t to)
{
    uint64_t start = minimum(maximum(segment->offset, from), to);
    uint64_t stop = maximum(minimum(segment->offset + segment->length, to), start);
    /* A segment that begins after `to` has nothing there. */
    uint64_t inner = start > segment->offset ? start - segment->offset : 0;
    return (struct part){.start = start, .stop = stop, .data = (const uint8_t *)segment->data + inner};
}

static struct part part_of(const struct place *place, size_t i)
{
    return part_between(&place->segments[i], place->placement->offset, end_of(place->placement));
}

/* Bytes that the segments give. */
static uint64_t given(const struct place *place)
{
    uint64_t bytes = 0;
    for (size_t i = 0; i < place->count; i++) {
        struct part part = part_of(place, i);
        bytes += part.stop - part.start;
    }
    return bytes;
}

/* The old contents of the disk, read like any reader would. */
static int read_fill(struct request *request, uint8_t *buffer, uint64_t offset, uint64_t length)
{
    return length == 0 ? 0 : layer_read(request, 0, buffer, offset, length);
}

static bool may_skip_zeros(const struct place *place)
{
    return place->placement->fresh && place->request->disk->layers[0]->cipher == NULL;
}

/*
 * Whether the disk is known to read as zeros where the placement is, so that its old contents need not be looked at. A
 * block of a format may be 256 MiB, of which a write has 4 KiB: the rest of a fresh place stays a hole of the host.
 */
static bool read_as_zeros(const struct place *place)
{
    const tapfs_disk *disk = place->request->disk;
    uint64_t size = disk->layers[0]->geometry.virtual_size;
    uint64_t at = place->placement->offset, end = minimum(end_of(place->placement), size);
    tapfs_extent runs[RUNS_AT_ONCE];

    while (at < end) {
        size_t count = 0;
        if (map_lookup(place->request->disk, 0, at, end - at, place->request->nowait, runs, RUNS_AT_ONCE, &count) !=
            MAP_FOUND) {
            return false; /* the fill says what is missing */
        }
        for (size_t i = 0; i < count; i++) {
            if (runs[i].kind != TAPFS_ZERO && (runs[i].kind != TAPFS_UNALLOCATED || disk->layer_count > 1)) {
                return false;
            }
        }
        at = runs[count - 1].offset + runs[count - 1].length;
    }
    return true;
}

/* ---- gathered: what follows each other on the host is written at once */

/* The old contents of [start, stop), a part of a placement whose fills fit into the memory for fills. */
static int gather_fill(struct gather *gather, const struct place *place, uint64_t start, uint64_t stop)
{
    const tapfs_placement *placement = place->placement;
    uint64_t length = stop - start, host = placement->host_offset + (start - placement->offset);

    if (length == 0) {
        return 0;
    }
    if (gather->fills == NULL) {
        gather->fills = malloc(gather->fills_capacity);
        if (gather->fills == NULL) {
            return request_fail(gather->request, ENOMEM, "write", 0, placement->file, host);
        }
    }
    if (length > gather->fills_capacity - gather->fills_length && gather_write(gather) != 0) {
        return -1;
    }
    uint8_t *fill = gather->fills + gather->fills_length;
    if (read_fill(gather->request, fill, start, length) != 0) {
        return -1;
    }
    if (may_skip_zeros(place) && tapfs_is_zero(fill, length)) {
        return 0;
    }
    /* Adding it may write what was gathered before; the fill stays where it is. */
    uint64_t used = gather->fills_length + length;
    int result = gather_add(gather, placement->file, host, fill, length);
    gather->fills_length = used;
    return result;
}

static int gather_place(struct gather *gather, const struct place *place, bool filled)
{
    const tapfs_placement *placement = place->placement;
    uint64_t at = placement->offset;
    int result = 0;

    for (size_t i = 0; i < place->count && result == 0; i++) {
        struct part part = part_of(place, i);
        if (filled) {
            result = gather_fill(gather, place, at, part.start);
        }
        if (result == 0) {
            result = gather_add(gather, placement->file, placement->host_offset + (part.start - placement->offset),
                                part.data, part.stop - part.start);
        }
        at = part.stop;
    }
    return result != 0 || !filled ? result : gather_fill(gather, place, at, end_of(placement));
}

/* ---- alone: long fills, the cipher, O_DIRECT */

static int write_parts(const struct place *place)
{
    const tapfs_placement *placement = place->placement;
    int result = 0;

    for (size_t i = 0; i < place->count && result == 0; i++) {
        struct part part = part_of(place, i);
        result = layer_write(place->request, placement->file, placement->host_offset + (part.start - placement->offset),
                             part.start, part.data, part.stop - part.start);
    }
    return result;
}

/* Bytes [at, stop) of the disk as they will be; `*new` says whether a segment gives any of them. */
static int bounce(const struct place *place, uint8_t *buffer, uint64_t at, uint64_t stop, bool *new)
{
    uint64_t filled = at;

    *new = false;
    for (size_t i = 0; i < place->count; i++) {
        struct part part = part_between(&place->segments[i], filled, stop);
        if (part.start == part.stop) {
            continue;
        }
        if (read_fill(place->request, buffer + (filled - at), filled, part.start - filled) != 0) {
            return -1;
        }
        memcpy(buffer + (part.start - at), part.data, part.stop - part.start);
        filled = part.stop;
        *new = true;
    }
    return read_fill(place->request, buffer + (filled - at), filled, stop - filled);
}

static int write_bounced(const struct place *place)
{
    const tapfs_placement *placement = place->placement;
    uint64_t end = end_of(placement);
    uint8_t *buffer =
        aligned_alloc(DIRECT_ALIGNMENT, round_up(minimum(placement->length, CHUNK_BYTES), DIRECT_ALIGNMENT));
    int result = 0;

    if (buffer == NULL) {
        return request_fail(place->request, ENOMEM, "write", 0, placement->file, placement->host_offset);
    }
    for (uint64_t at = placement->offset; at < end && result == 0; at += CHUNK_BYTES) {
        uint64_t stop = minimum(end, at + CHUNK_BYTES);
        bool new;
        result = bounce(place, buffer, at, stop, &new);
        if (result == 0 && (new || !may_skip_zeros(place) || !tapfs_is_zero(buffer, stop - at))) {
            result = layer_write(place->request, placement->file, placement->host_offset + (at - placement->offset), at,
                                 buffer, stop - at);
        }
    }
    free(buffer);
    return result;
}

static int write_place(struct gather *gather, const struct place *place)
{
    const tapfs_placement *placement = place->placement;
    const struct layer *layer = place->request->disk->layers[0];
    uint64_t fill = placement->in_place ? 0 : placement->length - given(place);
    bool zeros = fill > 0 && may_skip_zeros(place) && read_as_zeros(place);

    if (zeros) {
        fill = 0; /* what is not given stays as it is */
    }
    if (layer->cipher == NULL && !layer->files[placement->file]->ranged && fill <= GATHERED_FILL_MAX) {
        return gather_place(gather, place, fill > 0);
    }
    bool parts = placement->in_place || zeros || (fill == 0 && place->count == 1);
    return parts ? write_parts(place) : write_bounced(place);
}

/* ---- all of it */

/* The placements from `from` on; how many are done then, of all. */
static size_t write_places(struct request *request, const tapfs_segment *segments, size_t segment_count,
                           const tapfs_placement *placements, size_t count, size_t from)
{
    struct gather gather = {.request = request};
    size_t done = from, next = 0;

    for (size_t i = from; i < count && gather.fills_capacity < GATHERED_FILL_MAX; i++) {
        gather.fills_capacity = minimum(gather.fills_capacity + placements[i].length, GATHERED_FILL_MAX);
    }
    for (int result = 0; done < count && result == 0; done += result == 0) {
        const tapfs_placement *placement = &placements[done];
        while (next < segment_count && segments[next].offset + segments[next].length <= placement->offset) {
            next++;
        }
        size_t touching = 0;
        while (next + touching < segment_count && segments[next + touching].offset < end_of(placement)) {
            touching++;
        }
        const struct place place = {
            .request = request, .placement = placement, .segments = segments + next, .count = touching};
        result = write_place(&gather, &place);
        if (result == 0) {
            atomic_fetch_add(&request->disk->bytes_written, given(&place));
        }
    }
    (void)gather_write(&gather); /* also of what a MISS has ended; a failure is in the outcome */
    free(gather.fills);
    return done;
}

void tapfs_write_reserved(tapfs_disk *disk, const tapfs_segment *segments, size_t segment_count,
                          const tapfs_range *ranges, size_t range_count, const tapfs_placement *placements, size_t count,
                          size_t from, tapfs_outcome *outcome)
{
    struct request request;
    request_begin(&request, disk, outcome);
    const struct layer *layer = writable_layer(&request);

    if (layer != NULL && segments_valid(&request, segments, segment_count)) {
        if (from > count || !placements_valid(layer, placements, count) ||
            !placements_cover(placements, count, ranges, range_count)) {
            request_fail(&request, EINVAL, "write", 0, 0, segment_count > 0 ? segments[0].offset : 0);
        } else {
            outcome->done = write_places(&request, segments, segment_count, placements, count, from);
        }
    }
    request_end(&request);
}

void tapfs_zero_placements(tapfs_disk *disk, const tapfs_placement *placements, size_t count, int discard,
                           tapfs_outcome *outcome)
{
    struct request request;
    request_begin(&request, disk, outcome);
    const struct layer *layer = writable_layer(&request);
    int result = layer == NULL ? -1 : 0;

    for (size_t i = 0; i < count && result == 0; i++) {
        result = placement_valid(layer, &placements[i])
                     ? layer_zero(&request, &placements[i], discard != 0)
                     : request_fail(&request, EINVAL, "write zeros", 0, 0, placements[i].host_offset);
        tapfs_disk_note_written(disk, placements[i].offset, placements[i].length);
    }
    request_end(&request);
}
