/* Read many ranges of a disk into one buffer. The host gets to know of all of them before the first is waited for. */
#include "engine/chain_walk.h"

/* Looks at the map for the ranges that the host is told of. */
#define HINT_LOOKUPS 4096

/* Host bytes that will be read soon; runs that continue each other are one. */
struct hint_walk {
    struct walk walk; /* first, so that a walk is one of these */
    struct host_file *file;
    uint64_t host_offset, length;
};

static void tell_host(struct hint_walk *hint)
{
    if (hint->length > 0) {
        host_expect(hint->file, hint->host_offset, hint->length);
        hint->length = 0;
    }
}

static bool hint_run(struct walk *walk, const tapfs_mapped *run)
{
    struct hint_walk *hint = (struct hint_walk *)walk;

    walk->request.position = run->offset + run->length;
    if (run->kind != TAPFS_DATA || !run->placed) {
        return true;
    }
    struct host_file *file = walk->request.disk->layers[run->layer]->files[run->file];
    if (hint->length > 0 && hint->file == file && hint->host_offset + hint->length == run->host_offset) {
        hint->length += run->length;
        return true;
    }
    tell_host(hint);
    hint->file = file;
    hint->host_offset = run->host_offset;
    hint->length = run->length;
    return true;
}

struct range_read {
    struct request request;
    const tapfs_range *ranges;
    size_t count;
    uint8_t *buffer;
};

/* Bytes of the range at `index` that lie inside the disk. */
static uint64_t inside(const struct range_read *read, size_t index)
{
    uint64_t size = read->request.disk->layers[0]->geometry.virtual_size, offset = read->ranges[index].offset;
    return offset < size ? minimum(read->ranges[index].length, size - offset) : 0;
}

/* Tell the host of what is behind the first `done` bytes. */
static void hint_rest(const struct range_read *read, uint64_t done)
{
    struct hint_walk hint = {.walk = {.take = hint_run, .lookups_left = HINT_LOOKUPS}};
    uint64_t before = 0;

    for (size_t i = 0; i < read->count; i++) {
        uint64_t length = inside(read, i), skip = done > before ? minimum(done - before, length) : 0;
        before += read->ranges[i].length;
        if (skip < length) {
            tapfs_outcome outcome;
            walk_chain(&hint.walk, read->request.disk, read->ranges[i].offset + skip, length - skip, &outcome);
            if (hint.walk.request.position < read->ranges[i].offset + length) {
                break; /* a map is lacking, or this has taken long enough */
            }
        }
    }
    tell_host(&hint);
}

/* Read all but the first `from` bytes; how far it came. */
static uint64_t read_from(struct range_read *read, uint64_t from, bool nowait, tapfs_disk *disk,
                          tapfs_outcome *outcome)
{
    struct request *request = &read->request;
    uint64_t before = 0; /* bytes of the ranges before this one */

    request_begin(request, disk, outcome);
    request->nowait = nowait;
    for (size_t i = 0; i < read->count; before += read->ranges[i++].length) {
        uint64_t length = read->ranges[i].length, skip = from > before ? minimum(from - before, length) : 0;
        if (skip == length) {
            continue;
        }
        request->position = read->ranges[i].offset + skip;
        if (layer_read(request, 0, read->buffer + before + skip, read->ranges[i].offset + skip, length - skip) != 0) {
            from = before + (request->position - read->ranges[i].offset);
            break;
        }
        from = before + length;
    }
    request_end(request);
    return from;
}

void tapfs_read_ranges(tapfs_disk *disk, const tapfs_range *ranges, size_t count, uint64_t from, void *buffer,
                       tapfs_outcome *outcome)
{
    struct range_read read = {.ranges = ranges, .count = count, .buffer = buffer};
    uint64_t done = read_from(&read, from, true, disk, outcome);

    if (outcome->status == TAPFS_AGAIN) {
        hint_rest(&read, done);
        done = read_from(&read, done, false, disk, outcome);
    }
    outcome->done = done;
    atomic_fetch_add(&disk->bytes_read, done - from);
}
