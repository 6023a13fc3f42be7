/* The map of the whole chain as an array: for each run of the disk its layer and its place. */
#include "engine/chain_walk.h"

struct map_walk {
    struct walk walk; /* first, so that a walk is one of these */
    tapfs_mapped *runs;
    size_t count, capacity;
};

static bool continues(const tapfs_mapped *left, const tapfs_mapped *right)
{
    return left->kind == right->kind && left->layer == right->layer && left->file == right->file &&
           left->placed == right->placed && (!left->placed || left->host_offset + left->length == right->host_offset);
}

/* False: there is no room. */
static bool append(struct walk *walk, const tapfs_mapped *run)
{
    struct map_walk *map = (struct map_walk *)walk;
    tapfs_mapped *last = map->count > 0 ? &map->runs[map->count - 1] : NULL;

    if (last != NULL && continues(last, run)) {
        last->length += run->length;
    } else if (map->count == map->capacity) {
        return false;
    } else {
        map->runs[map->count++] = *run;
    }
    walk->request.position = run->offset + run->length;
    return true;
}

size_t tapfs_map(tapfs_disk *disk, uint64_t offset, uint64_t length, uint64_t lookups, tapfs_mapped *runs,
                 size_t count, size_t capacity, tapfs_outcome *outcome)
{
    struct map_walk map = {
        .walk = {.take = append, .lookups_left = lookups}, .runs = runs, .count = count, .capacity = capacity};

    walk_chain(&map.walk, disk, offset, length, outcome);
    outcome->done = map.walk.request.position - offset;
    return map.count;
}
