/*
 * Read the tables of a format: a map miss costs one read of the host file, and the owner is not asked.
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

void table_free(struct table *table)
{
    if (table != NULL) {
        free(table->places);
        free(table);
    }
}

static bool fits(uint64_t mask, uint8_t shift)
{
    return shift < 64 && mask <= (uint64_t)INT64_MAX >> shift;
}

static bool layout_valid(const tapfs_table *layout, uint32_t file_count)
{
    if ((layout->entry_bytes != 4 && layout->entry_bytes != 8) || layout->rule_count > 8 ||
        layout->table_file >= file_count || layout->data_file >= file_count ||
        layout->data_file > COMPRESSED_FILE_MAX || layout->table_alignment == 0 || layout->place_alignment == 0 ||
        layout->packed_length_shift >= 64 || layout->packed_sector_bytes > CHUNK_BYTES ||
        (layout->absent_kind != TAPFS_ZERO && layout->absent_kind != TAPFS_UNALLOCATED) ||
        !fits(layout->place_mask, layout->place_shift) || layout->place_add > INT64_MAX ||
        layout->packed_place_mask > INT64_MAX || layout->packed_length_mask > COMPRESSED_LENGTH_MAX) {
        return false;
    }
    for (uint32_t i = 0; i < layout->rule_count; i++) {
        if (layout->rules[i].kind > TAPFS_COMPRESSED) {
            return false;
        }
    }
    return true;
}

int tapfs_disk_set_tables(tapfs_disk *disk, uint32_t index, const tapfs_table *layout, const uint64_t *places,
                          size_t count)
{
    struct layer *layer = disk_layer(disk, index);
    if (layer == NULL || layer->geometry.identity || layer->table != NULL ||
        !layout_valid(layout, layer->file_count) ||
        count != round_up(layer->geometry.virtual_size, layer->geometry.map_unit) / layer->geometry.map_unit) {
        return -EINVAL;
    }
    struct table *table = calloc(1, sizeof *table);
    if (table != NULL) {
        table->places = calloc(count == 0 ? 1 : count, sizeof *table->places);
    }
    if (table == NULL || table->places == NULL) {
        table_free(table);
        return -ENOMEM;
    }
    table->layout = *layout;
    table->granule = layer->geometry.granule;
    table->writable = layer->geometry.writable;
    table->unit_count = count;
    atomic_init(&table->host_size, layout->host_size);
    atomic_init(&table->last_filled, UINT64_MAX - 1);
    for (size_t i = 0; i < count; i++) {
        atomic_init(&table->places[i], places[i]);
    }
    layer->table = table;
    return 0;
}

static void change_stamp(struct table *table, uint64_t unit)
{
    atomic_fetch_add(&table->stamps[unit % TABLE_STAMPS], 1);
}

int tapfs_disk_set_places(tapfs_disk *disk, uint32_t index, uint64_t first, const uint64_t *places, size_t count,
                          uint64_t host_size)
{
    const struct layer *layer = disk_layer(disk, index);
    struct table *table = layer == NULL ? NULL : layer->table;
    if (table == NULL || first > table->unit_count || count > table->unit_count - first) {
        return -EINVAL;
    }
    pthread_mutex_lock(&disk->cache.mutex);
    atomic_store(&table->host_size, host_size);
    for (size_t i = 0; i < count; i++) {
        atomic_store(&table->places[first + i], places[i]);
        change_stamp(table, first + i);
    }
    pthread_mutex_unlock(&disk->cache.mutex);
    return 0;
}

void table_changed(struct table *table, uint64_t first, uint64_t last)
{
    if (table == NULL) {
        return;
    }
    for (uint64_t unit = first; unit <= last && unit < table->unit_count; unit++) {
        atomic_store(&table->places[unit], TAPFS_TABLE_ASK);
        change_stamp(table, unit);
    }
}

/* ---- what may be */

/* Whether [start, start + length) of the host file is no metadata that the driver named. */
static bool unreserved(const tapfs_table *layout, uint64_t start, uint64_t length)
{
    for (size_t i = 0; i < 2; i++) {
        if (start < layout->reserved_end[i] && layout->reserved_start[i] < start + length) {
            return false;
        }
    }
    return start >= layout->least_place;
}

static bool table_place_possible(const struct table *table, uint64_t place, uint64_t bytes)
{
    return place % table->layout.table_alignment == 0 && in_host_range(place, bytes) &&
           place + bytes <= atomic_load(&table->host_size) && unreserved(&table->layout, place, bytes);
}

static bool entry_possible(const struct table *table, uint64_t word, const struct table_entry *entry,
                           uint64_t host_size)
{
    const tapfs_table *layout = &table->layout;
    switch (entry->kind) {
    case TAPFS_DATA:
        /* The last one may be cut short by the end of the file. */
        return (word & layout->zero_mask) == 0 && entry->host_offset % layout->place_alignment == 0 &&
               entry->host_offset < host_size && in_host_range(entry->host_offset, table->granule) &&
               unreserved(layout, entry->host_offset, table->granule);
    case TAPFS_COMPRESSED:
        return entry->host_length > 0 && entry->host_length <= COMPRESSED_LENGTH_MAX &&
               in_host_range(entry->host_offset, entry->host_length) &&
               entry->host_offset + entry->host_length <= host_size &&
               unreserved(layout, entry->host_offset, entry->host_length);
    default:
        return true;
    }
}

static bool all_possible(const struct table *table, const uint8_t *raw, uint64_t entries)
{
    uint64_t host_size = atomic_load(&table->host_size);
    for (uint64_t i = 0; i < entries; i++) {
        uint64_t word = table_word(table, raw, i);
        struct table_entry entry = table_decode(table, word);
        if (!entry_possible(table, word, &entry, host_size)) {
            return false;
        }
    }
    return true;
}

/* ---- filling */

/* Units that are being filled with one read. */
struct filling {
    tapfs_disk *disk;
    const struct layer *layer;
    struct table *table;
    uint32_t index;
    uint64_t first;
    uint32_t count;
    uint32_t table_bytes; /* of a whole unit */
    uint64_t stamps[AHEAD_UNITS], places[AHEAD_UNITS];
    struct unit *units[AHEAD_UNITS];
};

static uint32_t unit_length(const struct filling *filling, uint64_t unit)
{
    const tapfs_layer *geometry = &filling->layer->geometry;
    uint64_t end = round_up(geometry->virtual_size, geometry->granule);
    return (uint32_t)minimum(geometry->map_unit, end - unit * geometry->map_unit);
}

static uint32_t bytes_of(const struct filling *filling, uint64_t unit)
{
    uint64_t entries = unit_length(filling, unit) / filling->table->granule;
    return (uint32_t)(entries * filling->table->layout.entry_bytes);
}

/* Note the place of the next unit, in this order: a place that changes later moves the stamp. */
static uint64_t note(struct filling *filling, uint64_t unit)
{
    filling->stamps[filling->count] = atomic_load(&filling->table->stamps[unit % TABLE_STAMPS]);
    filling->places[filling->count] = atomic_load(&filling->table->places[unit]);
    return filling->places[filling->count++];
}

/* Take the neighbours along whose tables follow that of the first unit on the host. */
static void look_ahead(struct filling *filling)
{
    struct table *table = filling->table;
    uint64_t most = minimum(AHEAD_UNITS, AHEAD_BYTES / filling->table_bytes);

    while (filling->count < most && filling->first + filling->count < table->unit_count) {
        uint64_t expected = filling->places[0] + (uint64_t)filling->count * filling->table_bytes;
        if (note(filling, filling->first + filling->count) != expected) {
            filling->count--;
            return;
        }
    }
}

/* The unit in a table that was read; NULL if it is left to the owner. */
static struct unit *unit_in(const struct filling *filling, uint32_t i, const uint8_t *raw)
{
    uint64_t unit = filling->first + i;
    uint32_t bytes = bytes_of(filling, unit);
    struct unit *built = NULL;

    if (all_possible(filling->table, raw, bytes / filling->table->layout.entry_bytes)) {
        built = unit_for_table(filling->table, filling->index, unit, unit_length(filling, unit), bytes);
    }
    if (built != NULL) {
        memcpy(unit_table(built), raw, bytes);
        built = unit_compacted(built);
    }
    return built;
}

/* 0 or an errno. */
static int read_units(struct filling *filling, bool nowait)
{
    uint64_t bytes = (uint64_t)(filling->count - 1) * filling->table_bytes +
                     bytes_of(filling, filling->first + filling->count - 1);
    struct host_file *file = filling->layer->files[filling->table->layout.table_file];
    uint64_t got = 0;
    uint8_t *raw;

    if (!table_place_possible(filling->table, filling->places[0], bytes)) {
        return EUCLEAN;
    }
    raw = malloc(bytes);
    if (raw == NULL) {
        return ENOMEM;
    }
    int error = host_read(file, raw, filling->places[0], bytes, nowait, &got);
    if (error == 0 && got < bytes) {
        error = EUCLEAN;
    }
    for (uint32_t i = 0; error == 0 && i < filling->count; i++) {
        filling->units[i] = unit_in(filling, i, raw + (uint64_t)i * filling->table_bytes);
    }
    free(raw);
    return error;
}

/* Whether nothing of unit i has changed since its place was noted; the mutex of the cache is held. */
static bool still_true(const struct filling *filling, uint32_t i)
{
    const struct table *table = filling->table;
    uint64_t unit = filling->first + i;
    return atomic_load(&table->stamps[unit % TABLE_STAMPS]) == filling->stamps[i] &&
           atomic_load(&table->places[unit]) == filling->places[i];
}

/* Whether the first unit is in the cache now. */
static bool put(struct filling *filling)
{
    struct cache *cache = &filling->disk->cache;
    bool done = false;

    pthread_mutex_lock(&cache->mutex);
    /* The first one last, so that it is the newest. */
    for (uint32_t i = filling->count; i-- > 0;) {
        if (filling->units[i] == NULL) {
            continue;
        }
        if (still_true(filling, i)) {
            cache_insert(cache, filling->units[i]);
            cache->filled++;
            done = done || i == 0;
        } else {
            free(filling->units[i]);
        }
    }
    pthread_mutex_unlock(&cache->mutex);
    return done;
}

int table_fill(tapfs_disk *disk, uint32_t index, uint64_t unit, bool nowait)
{
    const struct layer *layer = disk->layers[index];
    struct table *table = layer->table;

    if (unit >= table->unit_count) {
        return MAP_MISSING;
    }
    bool sequential = atomic_exchange(&table->last_filled, unit) + 1 == unit;
    for (int attempt = 0; attempt < TRIES; attempt++) {
        struct filling filling = {.disk = disk, .layer = layer, .table = table, .index = index, .first = unit};
        filling.table_bytes =
            (uint32_t)(layer->geometry.map_unit / table->granule * table->layout.entry_bytes);
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
            int error = read_units(&filling, nowait);
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
        if (put(&filling)) {
            return MAP_FOUND;
        }
    }
    return MAP_MISSING;
}
