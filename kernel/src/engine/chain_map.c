/* The map of the whole chain as an array: for each run of the disk its layer and its place. */
#include <stdlib.h>

#include "engine/chain_walk.h"
#include "engine/tables.h"

struct map_walk {
    struct walk walk; /* first, so that a walk is one of these */
    tapfs_mapped *runs;
    size_t count, capacity;
    /* The entries that were read last for the places of zeros: of a layer, and of a piece of the disk in the cache. */
    uint8_t *entries;
    uint64_t entry_bytes, unit;
    uint32_t layer;
    bool known;
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

/* Have the entries of a unit of the cache. False: they are not to be had. */
static bool load_entries(struct map_walk *map, const struct layer *layer, uint32_t index, uint64_t unit)
{
    const struct table *table = layer->table;
    uint64_t place = atomic_load(&table->places[unit / table->pieces]), got = 0;
    uint64_t bytes = layer->cached_unit / table->span * table->entry_stride;

    if (map->known && map->layer == index && map->unit == unit) {
        return true;
    }
    map->known = false;
    if (place == TAPFS_TABLE_ABSENT || place == TAPFS_TABLE_ASK) {
        return false;
    }
    if (map->entry_bytes < bytes) {
        uint8_t *larger = realloc(map->entries, bytes);
        if (larger == NULL) {
            return false;
        }
        map->entries = larger;
        map->entry_bytes = bytes;
    }
    place &= ~(table->layout.flagged_places != 0 ? (uint64_t)1 : 0);
    memset(map->entries, 0, bytes); /* the last table may end with the file */
    if (!table_place_possible(table, place, bytes) ||
        host_read(layer->files[table->layout.table_file], map->entries, place + unit % table->pieces * bytes, bytes, false,
                  &got) != 0) {
        return false;
    }
    map->known = true;
    map->layer = index;
    map->unit = unit;
    return true;
}

/* Where `run` begins at an entry of zeros or of nothing: its length in that entry, and its place, if the entry has one. */
static void place_in_entry(const struct map_walk *map, const struct layer *layer, tapfs_mapped *run)
{
    const struct table *table = layer->table;
    const tapfs_table *layout = &table->layout;
    uint64_t inside = run->offset % table->span;
    uint64_t word = table_word(table, map->entries, run->offset % layer->cached_unit / table->span);
    /* Place 0 is one only in a file of data alone, and where bits of granules tell it from nothing. */
    bool at_start = layout->place_is_offset && layout->bitmap.where == TAPFS_BITMAP_IN_ENTRY &&
                    (word & layout->in_place_mask) == layout->in_place_value;

    run->length = minimum(run->length, table->span - inside);
    if (table_decode(table, word).kind != TAPFS_COMPRESSED && ((word & layout->place_mask) != 0 || at_start)) {
        run->placed = true;
        run->file = layout->data_file;
        run->host_offset = table_data_place(layout, word) + inside;
    }
}

static bool append_placed(struct walk *walk, const tapfs_mapped *run)
{
    struct map_walk *map = (struct map_walk *)walk;
    const struct layer *layer = walk->request.disk->layers[run->layer];
    uint64_t end = run->offset + run->length, inside = minimum(end, layer->geometry.virtual_size);

    if (run->placed || run->kind == TAPFS_DATA || run->kind == TAPFS_COMPRESSED || layer->table == NULL ||
        !layer->table->layout.zeros_keep_places || layer->cipher != NULL) {
        return append(walk, run);
    }
    for (tapfs_mapped part = *run; part.offset < end;) {
        uint64_t offset = part.offset, unit = offset / layer->cached_unit;
        uint64_t absent = offset < inside ? table_absent_until(layer, offset, inside) : end;
        part = *run;
        part.offset = offset;
        part.length = end - offset;
        if (absent > offset) {
            part.length = absent - offset;
        } else if (load_entries(map, layer, run->layer, unit)) {
            part.length = inside - offset;
            place_in_entry(map, layer, &part);
        } else {
            part.length = minimum(inside, (unit + 1) * layer->cached_unit) - offset;
        }
        if (!append(walk, &part)) {
            return false;
        }
        part.offset = offset + part.length;
    }
    return true;
}

size_t tapfs_map_places(tapfs_disk *disk, uint64_t offset, uint64_t length, uint64_t lookups, tapfs_mapped *runs,
                        size_t count, size_t capacity, tapfs_outcome *outcome)
{
    struct map_walk map = {
        .walk = {.take = append_placed, .lookups_left = lookups}, .runs = runs, .count = count, .capacity = capacity};

    walk_chain(&map.walk, disk, offset, length, outcome);
    free(map.entries);
    outcome->done = map.walk.request.position - offset;
    return map.count;
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
