/* Write in place, as far as the map allows: one run of bytes, or many. */
#include <errno.h>

#include "engine/internal.h"

#define RUNS_AT_ONCE 24

static bool inside_disk(const struct layer *layer, uint64_t offset, uint64_t length)
{
    uint64_t size = layer->geometry.virtual_size;
    return offset <= size && length <= size - offset;
}

bool segments_valid(struct request *request, const tapfs_segment *segments, size_t count)
{
    const struct layer *layer = request->disk->layers[0];
    uint64_t end = 0;

    for (size_t i = 0; i < count; i++) {
        if (!inside_disk(layer, segments[i].offset, segments[i].length)) {
            request_fail(request, ERANGE, "write", 0, 0, segments[i].offset);
            return false;
        }
        if (segments[i].offset < end) {
            request_fail(request, EINVAL, "write", 0, 0, segments[i].offset);
            return false;
        }
        end = segments[i].offset + segments[i].length;
    }
    return true;
}

/* What is not in place, as ranges of whole granules. */
struct gaps {
    tapfs_range *ranges;
    size_t count, capacity;
    uint64_t granule;
};

struct in_place_write {
    struct request *request;
    const uint8_t *buffer; /* of `offset` */
    uint64_t offset;
    tapfs_extent pending; /* runs that are contiguous on the host; none while length is 0 */
    uint64_t gap;         /* where the run begins that needs a reservation; UINT64_MAX: not met */
    struct gaps *gaps;    /* NULL: the first gap ends the write */
    uint64_t written;
};

/* False: there is no room for it. */
static bool note_gap(struct gaps *gaps, uint64_t start, uint64_t end)
{
    tapfs_range *last = gaps->count > 0 ? &gaps->ranges[gaps->count - 1] : NULL;

    start = round_down(start, gaps->granule);
    end = round_up(end, gaps->granule);
    if (last != NULL && start <= last->offset + last->length) {
        last->length = maximum(last->offset + last->length, end) - last->offset;
        return true;
    }
    if (gaps->count == gaps->capacity) {
        return false;
    }
    gaps->ranges[gaps->count++] = (tapfs_range){.offset = start, .length = end - start};
    return true;
}

static int write_pending(struct in_place_write *write)
{
    tapfs_extent *pending = &write->pending;
    if (pending->length == 0) {
        return 0;
    }
    if (layer_write(write->request, pending->file, pending->host_offset, pending->offset,
                    write->buffer + (pending->offset - write->offset), pending->length) != 0) {
        return -1;
    }
    write->request->position = pending->offset + pending->length;
    write->written += pending->length;
    pending->length = 0;
    return 0;
}

/* 1: go on; 0: the write ends before this run; -1: failed. */
static int take_run(struct in_place_write *write, const tapfs_extent *run)
{
    tapfs_extent *pending = &write->pending;

    if (run->kind != TAPFS_DATA || !run->in_place || guarded(write->request->disk, run)) {
        if (write->gaps != NULL) {
            return note_gap(write->gaps, run->offset, run->offset + run->length) ? 1 : 0;
        }
        if (write->gap == UINT64_MAX) {
            write->gap = run->offset;
        }
        return 1;
    }
    if (write->gap != UINT64_MAX) {
        return 0;
    }
    /* Behind a gap a run may continue on the host what was before the gap. */
    if (pending->length > 0 && pending->file == run->file && pending->offset + pending->length == run->offset &&
        pending->host_offset + pending->length == run->host_offset) {
        pending->length += run->length;
        return 1;
    }
    if (write_pending(write) != 0) {
        return -1;
    }
    *pending = *run;
    return 1;
}

/* Take the runs of [*at, end); `*at` is how far they could be taken, MAP_FOUND or why no further. -1: failed. */
static int take_runs(struct in_place_write *write, uint64_t *at, uint64_t end)
{
    struct request *request = write->request;
    tapfs_extent runs[RUNS_AT_ONCE];
    int found = MAP_FOUND;

    for (int go_on = 1; *at < end && go_on == 1;) {
        size_t count = 0;
        found = map_lookup(request->disk, 0, *at, end - *at, request->nowait, runs, RUNS_AT_ONCE, &count);
        if (found != MAP_FOUND) {
            break;
        }
        for (size_t i = 0; i < count && go_on == 1; i++) {
            go_on = take_run(write, &runs[i]);
            if (go_on < 0) {
                return -1;
            }
            *at = go_on == 1 ? runs[i].offset + runs[i].length : *at;
        }
    }
    return write_pending(write) != 0 ? -1 : found;
}

static int write_mapped(struct in_place_write *write, uint64_t end)
{
    uint64_t at = write->offset;
    int found = take_runs(write, &at, end);

    if (found < 0) {
        return -1;
    }
    if (write->gap != UINT64_MAX) {
        return request_stop(write->request, TAPFS_RESERVE, 0, write->gap, at - write->gap);
    }
    if (found == MAP_WOULD_BLOCK) {
        return request_again(write->request, EAGAIN);
    }
    return found == MAP_FOUND ? 0 : request_stop(write->request, TAPFS_MISS, 0, at, end - at);
}

static int write_identity(struct request *request, const tapfs_layer *geometry, uint64_t offset, const uint8_t *buffer,
                          uint64_t length)
{
    if (geometry->identity_file >= request->disk->layers[0]->file_count) {
        return request_fail(request, EBADF, "write", 0, 0, offset);
    }
    return length == 0 ? 0
                       : layer_write(request, geometry->identity_file, geometry->identity_offset + offset, offset,
                                     buffer, length);
}

void tapfs_write(tapfs_disk *disk, const void *buffer, uint64_t offset, uint64_t length, uint32_t flags,
                 tapfs_outcome *outcome)
{
    struct request request;
    request_begin(&request, disk, outcome);
    request.position = offset;
    request.nowait = (flags & TAPFS_NOWAIT) != 0;
    const struct layer *layer = writable_layer(&request);

    if (layer == NULL) {
        /* writable_layer has said it */
    } else if (!inside_disk(layer, offset, length)) {
        request_fail(&request, ERANGE, "write", 0, 0, offset);
    } else if (length > 0 && atomic_load(&disk->sealed)) {
        request_stop(&request, TAPFS_RESERVE, 0, offset, length);
    } else if (layer->geometry.identity) {
        if (write_identity(&request, &layer->geometry, offset, buffer, length) == 0) {
            request.position = offset + length;
        }
    } else {
        struct in_place_write write = {.request = &request, .buffer = buffer, .offset = offset, .gap = UINT64_MAX};
        write_mapped(&write, offset + length);
    }
    outcome->done = request.position - offset;
    atomic_fetch_add(&disk->bytes_written, outcome->done);
    tapfs_disk_note_written(disk, offset, length); /* of a run that failed a part may be written */
    request_end(&request);
}

/* ---- many runs */

/* Bytes [*at, end) of a segment. `*at` is how far they are written or noted, and the outcome says what stopped it, unless
 * there is no more room for gaps. */
static void write_segment(struct in_place_write *write, const tapfs_segment *segment, uint64_t *at)
{
    struct request *request = write->request;
    const tapfs_layer *geometry = &request->disk->layers[0]->geometry;
    uint64_t end = segment->offset + segment->length;

    if (atomic_load(&request->disk->sealed)) {
        *at = note_gap(write->gaps, *at, end) ? end : *at;
        return;
    }
    write->buffer = segment->data;
    write->offset = segment->offset;
    if (geometry->identity) {
        if (write_identity(request, geometry, *at, write->buffer + (*at - segment->offset), end - *at) == 0) {
            write->written += end - *at;
            *at = end;
        }
    } else if (take_runs(write, at, end) == MAP_MISSING) {
        request_stop(request, TAPFS_MISS, 0, *at, end - *at);
    }
}

size_t tapfs_write_segments(tapfs_disk *disk, const tapfs_segment *segments, size_t count, uint64_t from,
                            tapfs_range *gaps, size_t gap_count, size_t capacity, tapfs_outcome *outcome)
{
    struct request request;
    request_begin(&request, disk, outcome);
    const struct layer *layer = writable_layer(&request);
    struct gaps noted = {.ranges = gaps, .count = gap_count, .capacity = capacity};
    uint64_t done = 0;

    if (layer != NULL && segments_valid(&request, segments, count)) {
        struct in_place_write write = {.request = &request, .gap = UINT64_MAX, .gaps = &noted};
        noted.granule = layer->geometry.granule;
        for (size_t i = 0; i < count; i++) {
            uint64_t at = segments[i].offset + (from > done ? minimum(from - done, segments[i].length) : 0);
            uint64_t end = segments[i].offset + segments[i].length;
            if (at < end) {
                uint64_t start = at;
                write_segment(&write, &segments[i], &at);
                tapfs_disk_note_written(disk, start, end - start);
            }
            done += at - segments[i].offset;
            if (at < end) {
                break;
            }
        }
        atomic_fetch_add(&disk->bytes_written, write.written);
    }
    outcome->done = done;
    request_end(&request);
    return noted.count;
}
