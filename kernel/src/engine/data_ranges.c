/*
 * Ranges of a disk that are known to hold data, as arrays: joined, widened, bounded in bytes.
 *
 * A block of a format may be large, and a hole of the host's file for the most part: what was never written of it reads
 * as zeros. The host is asked where its file is sparse, a few times for each run, however many extents the file has.
 */
#include "engine/chain_walk.h"

/* Of shorter runs the host is not asked: to read a hole costs no more. */
#define LEAST_ASKED_BYTES (128u << 10)
/* A run without holes is looked at in pieces that grow from this to the other. */
#define FIRST_PIECE_BYTES (64u << 10)
#define LARGEST_PIECE_BYTES (4u << 20)

struct range_walk {
    struct walk walk; /* first, so that a walk is one of these */
    tapfs_range *ranges;
    size_t count, capacity;
    uint64_t start, end; /* of the request */
    uint64_t gap, align;
    uint64_t bytes_left;
};

static uint64_t end_of(const tapfs_range *range)
{
    return range->offset + range->length;
}

/* How far the ranges reach; before the first one the start of the request. */
static uint64_t reached(const struct range_walk *search)
{
    return search->count == 0 ? search->start : end_of(&search->ranges[search->count - 1]);
}

/* Add [start, stop), as far as there is room. False: there was no room for all of it, or there is none left. */
static bool add(struct range_walk *search, uint64_t start, uint64_t stop)
{
    struct request *request = &search->walk.request;
    bool joined = search->count > 0 && start - reached(search) <= search->gap;
    uint64_t from = joined ? reached(search) : start;
    uint64_t part = minimum(stop - from, search->bytes_left);

    if (from + part <= start || (!joined && search->count == search->capacity)) {
        return false; /* nothing of the data itself */
    }
    if (joined) {
        search->ranges[search->count - 1].length += part;
    } else {
        search->ranges[search->count++] = (tapfs_range){.offset = start, .length = part};
    }
    search->bytes_left -= part;
    request->position = from + part;
    return from + part == stop && search->bytes_left > 0;
}

static bool add_aligned(struct range_walk *search, uint64_t start, uint64_t stop)
{
    return add(search, maximum(round_down(start, search->align), reached(search)), round_up(stop, search->align));
}

/* The host file whose holes are looked for in a run; NULL: all of the run is data, or its holes are known already. */
static struct host_file *file_with_holes(const struct range_walk *search, const tapfs_mapped *run)
{
    const struct layer *layer = search->walk.request.disk->layers[run->layer];
    struct host_file *file = run->placed && !layer->geometry.identity ? layer->files[run->file] : NULL;

    /* Behind the end of its file a run is cut, and what has not come yet looks like a hole. */
    return file != NULL && file->sparse && file->present == NULL && run->length >= LEAST_ASKED_BYTES &&
                   run->host_offset + run->length <= atomic_load(&file->known_size)
               ? file
               : NULL;
}

/*
 * The data of a run, by the host. Before a hole has been met nobody knows how far the next one is, and the search for it
 * may pass over a million extents: so only the beginning of each piece is asked for, and pieces double.
 */
static bool add_between_holes(struct range_walk *search, const tapfs_mapped *run, struct host_file *file, bool *holes)
{
    struct request *request = &search->walk.request;
    uint64_t stop = run->offset + run->length, shift = run->host_offset - run->offset; /* modulo 2^64 */
    uint64_t at = maximum(run->offset, request->position), piece = FIRST_PIECE_BYTES;

    while (at < stop) {
        if (search->walk.lookups_left == 0) {
            return false;
        }
        search->walk.lookups_left--;
        uint64_t data = host_next_data(file, at + shift, stop + shift) - shift;
        if (data > at) {
            *holes = true;
            at = data;
            request->position = at;
            if (at == stop) {
                break;
            }
        }
        uint64_t end = *holes ? host_next_hole(file, at + shift, stop + shift) - shift : minimum(stop, at + piece);
        if (!add_aligned(search, at, end)) {
            return false;
        }
        at = maximum(end, request->position);
        piece = minimum(2 * piece, LARGEST_PIECE_BYTES);
    }
    return true;
}

/* What a file has lost at its end is no hole: it is asked for once the holes of a run are known. */
static bool add_without_holes(struct range_walk *search, const tapfs_mapped *run, struct host_file *file)
{
    bool holes = false, more = add_between_holes(search, run, file, &holes);
    int error = holes ? host_look_for_cut(file) : 0;

    if (error != 0) {
        request_fail(&search->walk.request, error, "map", run->layer, run->file, run->host_offset);
        return false;
    }
    return more;
}

static bool take_data(struct walk *walk, const tapfs_mapped *run)
{
    struct range_walk *search = (struct range_walk *)walk;
    uint64_t stop = run->offset + run->length;

    if (stop <= walk->request.position) {
        return true; /* a range was widened over it */
    }
    if (run->kind != TAPFS_DATA && run->kind != TAPFS_COMPRESSED) {
        walk->request.position = stop;
        return true;
    }
    struct host_file *file = file_with_holes(search, run);
    return file == NULL ? add_aligned(search, run->offset, stop) : add_without_holes(search, run, file);
}

size_t tapfs_data_ranges(tapfs_disk *disk, uint64_t offset, uint64_t length, uint64_t gap, uint64_t align,
                         uint64_t bytes, uint64_t lookups, tapfs_range *ranges, size_t capacity,
                         tapfs_outcome *outcome)
{
    struct range_walk search = {
        .walk = {.take = take_data, .lookups_left = lookups},
        .ranges = ranges,
        .capacity = capacity,
        .start = offset,
        .end = offset + length,
        .gap = gap,
        .align = align,
        .bytes_left = bytes,
    };
    walk_chain(&search.walk, disk, offset, length, outcome);
    uint64_t position = minimum(search.walk.request.position, search.end);
    if (position < search.end) {
        /* What comes next may be widened to here. */
        position = maximum(round_down(position, align), minimum(reached(&search), search.end));
    }
    outcome->done = position - offset;
    return search.count;
}

size_t tapfs_union_ranges(const tapfs_range *left, size_t left_count, const tapfs_range *right, size_t right_count,
                          uint64_t end, tapfs_range *ranges)
{
    size_t count = 0, i = 0, j = 0;

    while (i < left_count || j < right_count) {
        bool from_left = j == right_count || (i < left_count && left[i].offset <= right[j].offset);
        const tapfs_range *next = from_left ? &left[i++] : &right[j++];
        uint64_t stop = minimum(end_of(next), end);
        if (next->offset >= end) {
            break;
        }
        if (count > 0 && next->offset <= end_of(&ranges[count - 1])) {
            ranges[count - 1].length = maximum(end_of(&ranges[count - 1]), stop) - ranges[count - 1].offset;
        } else {
            ranges[count++] = (tapfs_range){.offset = next->offset, .length = stop - next->offset};
        }
    }
    return count;
}
