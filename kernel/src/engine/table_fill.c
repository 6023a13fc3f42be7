/*
 * Read the tables of a format: a map miss costs one read of the host file, and the owner is not asked. Bitmaps that lie
 * outside the table are read with it.
 *
 * Nothing that is read is trusted. If the layout does not allow an entry, the owner is asked for that unit, and the
 * owner's own reading says what is wrong. A unit is cached only if neither its place nor its map has changed since
 * before the read (`stamps`). So a table that is being rewritten is never cached as it was (kernel/src/engine/CONCURRENCY.md).
 */
#include <errno.h>
#include <stdlib.h>

#include "engine/unit.h"

/* Tables that follow one another are read together, up to so many, when units are missed in order. */
#define AHEAD_UNITS 16u
#define AHEAD_BYTES (64u << 10)
/* A table that changes all the time while it is read is left to the owner. */
#define TRIES 4

/* Units of the cache that are being filled with one read: map units, or pieces of such. */
struct filling {
    tapfs_disk *disk;
    const struct layer *layer;
    struct table *table;
    uint32_t index;
    bool nowait;
    uint64_t offset, length; /* what is wanted of the first unit */
    tapfs_extent *runs;
    size_t capacity;
    uint64_t first;
    uint32_t count;
    uint32_t table_bytes; /* of a whole unit */
    uint64_t stamps[AHEAD_UNITS], places[AHEAD_UNITS];
    struct unit *units[AHEAD_UNITS];
};

/* The bytes of the disk in a piece of `size` with that number. */
static uint64_t disk_part(const struct filling *filling, uint64_t size, uint64_t number)
{
    const tapfs_layer *geometry = &filling->layer->geometry;
    uint64_t end = round_up(geometry->virtual_size, geometry->granule);
    return number > end / size ? 0 : minimum(size, end - number * size);
}

static uint32_t unit_length(const struct filling *filling, uint64_t unit)
{
    return (uint32_t)disk_part(filling, filling->layer->cached_unit, unit);
}

static uint32_t bytes_of(const struct filling *filling, uint64_t unit)
{
    return (uint32_t)(table_entries(filling->table, unit_length(filling, unit)) * filling->table->entry_stride);
}

/* Note the place of the table that has the next unit, in this order: a place that changes later moves the stamp. */
static uint64_t note(struct filling *filling, uint64_t unit)
{
    uint64_t map_unit = unit / filling->table->pieces;
    filling->stamps[filling->count] = atomic_load(&filling->table->stamps[map_unit % TABLE_STAMPS]);
    filling->places[filling->count] = atomic_load(&filling->table->places[map_unit]);
    return filling->places[filling->count++];
}

/* Where the table of the i-th unit is on the host: its place without the flag. */
static uint64_t table_at(const struct filling *filling, uint32_t i)
{
    uint64_t flag = filling->table->layout.flagged_places != 0 ? 1 : 0;
    return filling->places[i] & ~flag;
}

/* Whether the whole table of the i-th unit may lie where it is. */
static bool place_possible(const struct filling *filling, uint32_t i)
{
    const struct table *table = filling->table;
    uint64_t length =
        disk_part(filling, filling->layer->geometry.map_unit, (filling->first + i) / table->pieces);
    return table_place_possible(table, table_at(filling, i), table_entries(table, length) * table->entry_stride);
}

/* Where the entries of the i-th unit are on the host, if its table may be there. */
static uint64_t entries_at(const struct filling *filling, uint32_t i)
{
    return table_at(filling, i) + (filling->first + i) % filling->table->pieces * filling->table_bytes;
}

/* Take the neighbours along whose entries follow those of the first unit on the host. */
static void look_ahead(struct filling *filling)
{
    struct table *table = filling->table;
    uint64_t most = minimum(AHEAD_UNITS, AHEAD_BYTES / filling->table_bytes);

    if (table->layout.bitmap.where == TAPFS_BITMAP_IN_BLOCK) {
        return; /* each of them would cost a read more, far from the others */
    }
    while (filling->count < most && unit_length(filling, filling->first + filling->count) > 0) {
        uint32_t i = filling->count;
        uint64_t place = note(filling, filling->first + i);
        if (place == TAPFS_TABLE_ABSENT || place == TAPFS_TABLE_ASK || !place_possible(filling, i) ||
            entries_at(filling, i) != entries_at(filling, 0) + (uint64_t)i * filling->table_bytes) {
            filling->count--;
            return;
        }
    }
}

/* All of these bytes, or an errno. */
static int read_whole(const struct filling *filling, uint32_t file, void *buffer, uint64_t offset, uint64_t bytes)
{
    uint64_t got = 0;
    int error = host_read(filling->layer->files[file], buffer, offset, bytes, filling->nowait, &got);
    return error == 0 && got < bytes ? EUCLEAN : error;
}

/* The bitmap of each entry that has one, from before its data. */
static int read_block_bits(const struct filling *filling, const uint8_t *raw, uint64_t entries, uint8_t *bits)
{
    const struct table *table = filling->table;
    for (uint64_t i = 0; i < entries; i++) {
        struct table_entry entry = table_decode(table, table_word(table, raw, i));
        if (!entry.bitmapped) {
            continue;
        }
        int error = read_whole(filling, table->layout.data_file, bits + i * table->entry_bits,
                               entry.host_offset - table->layout.bitmap.block_bytes, table->entry_bits);
        if (error != 0) {
            return error;
        }
    }
    return 0;
}

/* The bits of the whole unit, from where a word says. */
static int read_table_bits(const struct filling *filling, uint64_t unit, uint64_t entries, uint8_t *bits)
{
    const struct table *table = filling->table;
    const tapfs_table_bitmap *bitmap = &table->layout.bitmap;
    uint64_t piece_bytes = filling->layer->cached_unit / table->granule / 8, words, word_place;
    uint64_t pieces_together; /* with their bits */
    uint8_t bytes[8];

    if (__builtin_mul_overflow(bitmap->word_units, table->pieces, &pieces_together) ||
        __builtin_mul_overflow(unit / pieces_together, bitmap->word_stride, &words) ||
        __builtin_add_overflow(words, bitmap->word_place, &word_place) ||
        !table_place_possible(table, word_place, table->layout.entry_bytes)) {
        return EUCLEAN;
    }
    int error = read_whole(filling, table->layout.table_file, bytes, word_place, table->layout.entry_bytes);
    if (error != 0) {
        return error;
    }
    uint64_t word = table_load(table, bytes, table->layout.entry_bytes);
    uint64_t place = table_data_place(&table->layout, word), at = unit % pieces_together * piece_bytes;
    uint64_t length = entries * table->entry_bits;
    if ((word & bitmap->word_mask) != bitmap->word_value || !table_bits_possible(table, word, place, at + length)) {
        return EUCLEAN;
    }
    return read_whole(filling, table->layout.table_file, bits, place + at, length);
}

/* What lies outside the table of a checked unit, read behind its entries. */
static int read_bits(const struct filling *filling, uint64_t unit, uint8_t *raw, uint64_t entries)
{
    const struct table *table = filling->table;
    uint8_t *bits = raw + entries * table->entry_stride;
    bool any = false;

    memset(bits, 0, entries * table->entry_bits);
    for (uint64_t i = 0; i < entries && !any; i++) {
        any = table_decode(table, table_word(table, raw, i)).bitmapped;
    }
    if (!any) {
        return 0;
    }
    return table->layout.bitmap.where == TAPFS_BITMAP_IN_BLOCK ? read_block_bits(filling, raw, entries, bits)
                                                               : read_table_bits(filling, unit, entries, bits);
}

/* The unit in a table that was read. 0, or an errno and the unit is NULL: it is left to the owner, or to be waited for. */
static int unit_in(const struct filling *filling, uint32_t i, const uint8_t *raw, struct unit **built)
{
    const struct table *table = filling->table;
    uint64_t unit = filling->first + i, length = unit_length(filling, unit);
    uint64_t entries = table_entries(table, length), bytes = entries * table->entry_stride;
    uint64_t base = unit * filling->layer->cached_unit;
    uint64_t disk_left = minimum(length, filling->layer->geometry.virtual_size - base);

    bool may_be_in_place = table_at(filling, i) == filling->places[i];
    if (!table_entries_possible(table, raw, entries, base, disk_left, may_be_in_place)) {
        return EUCLEAN;
    }
    struct unit *made = unit_for_table(table, filling->index, unit, (uint32_t)length,
                                       (uint32_t)(bytes + entries * table->entry_bits));
    if (made == NULL) {
        return ENOMEM;
    }
    memcpy(unit_table(made), raw, bytes);
    int error = table->entry_bits != 0 ? read_bits(filling, unit, unit_table(made), entries) : 0;
    if (error != 0) {
        free(made);
        return error;
    }
    *built = unit_compacted(made);
    return 0;
}

/* 0 or an errno. */
static int read_units(struct filling *filling)
{
    uint64_t bytes = (uint64_t)(filling->count - 1) * filling->table_bytes +
                     bytes_of(filling, filling->first + filling->count - 1);

    if (!place_possible(filling, 0)) {
        return EUCLEAN;
    }
    uint8_t *raw = malloc(bytes);
    if (raw == NULL) {
        return ENOMEM;
    }
    int error = read_whole(filling, filling->table->layout.table_file, raw, entries_at(filling, 0), bytes);
    for (uint32_t i = 0; error == 0 && i < filling->count; i++) {
        int failed = unit_in(filling, i, raw + (uint64_t)i * filling->table_bytes, &filling->units[i]);
        error = i == 0 ? failed : 0;
    }
    free(raw);
    return error;
}

/* Whether nothing of unit i has changed since its place was noted; the mutex of the cache is held. */
static bool still_true(const struct filling *filling, uint32_t i)
{
    const struct table *table = filling->table;
    uint64_t map_unit = (filling->first + i) / table->pieces;
    return atomic_load(&table->stamps[map_unit % TABLE_STAMPS]) == filling->stamps[i] &&
           atomic_load(&table->places[map_unit]) == filling->places[i];
}

/* Put the units into the cache. The number of the runs that are wanted; 0: the first unit has changed meanwhile. */
static size_t put(struct filling *filling)
{
    struct cache *cache = &filling->disk->cache;
    uint64_t inner = filling->offset % filling->layer->cached_unit;
    size_t found = 0;

    pthread_mutex_lock(&cache->mutex);
    /* The first one last, so that it is the newest. */
    for (uint32_t i = filling->count; i-- > 0;) {
        if (filling->units[i] == NULL) {
            continue;
        }
        if (still_true(filling, i)) {
            filling->units[i]->ahead = i > 0;
            cache_insert(cache, filling->units[i]);
            cache->filled++;
            if (i == 0) {
                /* Here, because others may push the unit out again before it could be looked up. */
                const struct unit *unit = filling->units[0];
                found = unit_lookup(unit, filling->offset - inner, inner, minimum(inner + filling->length, unit->length),
                                    filling->runs, filling->capacity);
            }
        } else {
            free(filling->units[i]);
        }
    }
    pthread_mutex_unlock(&cache->mutex);
    unpacked_shrink(&filling->disk->codec.units);
    return found;
}

int table_fill(tapfs_disk *disk, uint32_t index, uint64_t offset, uint64_t length, bool nowait, tapfs_extent *runs,
               size_t capacity, size_t *count)
{
    const struct layer *layer = disk->layers[index];
    struct table *table = layer->table;
    uint64_t unit = offset / layer->cached_unit;

    if (unit / table->pieces >= table->unit_count) {
        return MAP_MISSING;
    }
    bool sequential = atomic_exchange(&table->last_filled, unit) + 1 == unit;
    for (int attempt = 0; attempt < TRIES; attempt++) {
        struct filling filling = {
            .disk = disk,
            .layer = layer,
            .table = table,
            .index = index,
            .nowait = nowait,
            .offset = offset,
            .length = length,
            .runs = runs,
            .capacity = capacity,
            .first = unit,
        };
        filling.table_bytes = (uint32_t)(layer->cached_unit / table->span * table->entry_stride);
        uint64_t place = note(&filling, unit);
        if (place == TAPFS_TABLE_ASK) {
            return MAP_MISSING;
        }
        if (place == TAPFS_TABLE_ABSENT) {
            filling.units[0] = unit_of_kind(table->layout.absent_kind, index, unit, unit_length(&filling, unit));
        } else {
            if (sequential) {
                look_ahead(&filling);
            }
            int error = read_units(&filling);
            if (nowait && (error == EAGAIN || error == EOPNOTSUPP)) {
                return MAP_WOULD_BLOCK;
            }
        }
        if (filling.units[0] == NULL) {
            for (uint32_t i = 1; i < filling.count; i++) {
                free(filling.units[i]);
            }
            return MAP_MISSING;
        }
        atomic_store(&table->last_filled, unit + filling.count - 1);
        *count = put(&filling);
        if (*count > 0) {
            return MAP_FOUND;
        }
    }
    return MAP_MISSING;
}
