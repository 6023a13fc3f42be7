/* The layouts of tables, and where the table of each map unit is: what a driver says, checked and kept. */
#include <errno.h>
#include <stdlib.h>

#include "engine/internal.h"
#include "engine/tables.h"

#define RESERVED_RANGES (sizeof((tapfs_table *)NULL)->reserved_end / sizeof((tapfs_table *)NULL)->reserved_end[0])

void table_free(struct table *table)
{
    if (table != NULL) {
        free(table->places);
        free(table);
    }
}

static bool is_kind_of_nothing(uint64_t kind)
{
    return kind == TAPFS_ZERO || kind == TAPFS_UNALLOCATED;
}

/* Whether the largest place of data that an entry can say is a host offset. */
static bool places_valid(const tapfs_table *layout)
{
    uint64_t number, product, place;
    if (layout->place_shift >= 64 || layout->place_low_shift >= 64 || layout->packed_place_shift >= 64 ||
        layout->place_mask > (uint64_t)INT64_MAX >> layout->place_shift ||
        layout->packed_place_mask > (uint64_t)INT64_MAX >> layout->packed_place_shift) {
        return false;
    }
    return !__builtin_add_overflow(layout->place_mask << layout->place_shift,
                                   layout->place_low_mask >> layout->place_low_shift, &number) &&
           !__builtin_mul_overflow(number, layout->place_multiplier, &product) &&
           !__builtin_add_overflow(product, layout->place_add, &place) && layout->place_add <= INT64_MAX &&
           product <= INT64_MAX;
}

static bool rules_valid(const tapfs_table *layout, const tapfs_layer *geometry)
{
    if (layout->rule_count > sizeof layout->rules / sizeof layout->rules[0]) {
        return false;
    }
    for (uint32_t i = 0; i < layout->rule_count; i++) {
        uint64_t kind = layout->rules[i].kind;
        if (kind > TAPFS_RULE_ASK ||
            (kind == TAPFS_COMPRESSED &&
             (geometry->packing.codec == TAPFS_CODEC_NONE ||
              geometry->packed_unit % (geometry->granule * layout->entry_granules) != 0))) {
            return false;
        }
    }
    return true;
}

static bool bitmap_valid(const tapfs_table *layout, uint64_t granules)
{
    const tapfs_table_bitmap *bitmap = &layout->bitmap;
    if (bitmap->where == TAPFS_BITMAP_NONE) {
        return true;
    }
    if (!is_kind_of_nothing(bitmap->clear_kind)) {
        return false;
    }
    if (bitmap->where == TAPFS_BITMAP_IN_ENTRY) {
        return layout->entry_granules == 32;
    }
    if (layout->entry_granules % 8 != 0 || granules / 8 > BITMAP_BYTES_MAX) {
        return false;
    }
    return bitmap->where == TAPFS_BITMAP_IN_BLOCK
               ? bitmap->block_bytes >= layout->entry_granules / 8
               : bitmap->where == TAPFS_BITMAP_IN_TABLE && bitmap->word_units > 0 &&
                     in_host_range(bitmap->word_place, layout->entry_bytes);
}

static bool layout_valid(const tapfs_table *layout, const struct layer *layer)
{
    const tapfs_layer *geometry = &layer->geometry;
    if ((layout->entry_bytes != 4 && layout->entry_bytes != 8) || layout->table_file >= layer->file_count ||
        layout->data_file >= layer->file_count || layout->data_file > COMPRESSED_FILE_MAX ||
        layout->table_alignment == 0 || layout->place_alignment == 0 || layout->packed_length_shift >= 64 ||
        layout->packed_sector_bytes > CHUNK_BYTES || layout->packed_length_mask > COMPRESSED_LENGTH_MAX ||
        layout->packed_bound > COMPRESSED_LENGTH_MAX || !is_kind_of_nothing(layout->absent_kind)) {
        return false;
    }
    uint64_t granules = geometry->map_unit / geometry->granule;
    return layout->entry_granules > 0 && granules % layout->entry_granules == 0 && places_valid(layout) &&
           rules_valid(layout, geometry) && bitmap_valid(layout, granules);
}

/* What is read for a map miss: a page of the table, or the whole of one that cannot be divided. */
#define PIECE_BYTES 4096u

static void set_strides(struct table *table, const tapfs_layer *geometry)
{
    const tapfs_table *layout = &table->layout;
    uint8_t where = layout->bitmap.where;

    table->granule = geometry->granule;
    table->span = geometry->granule * layout->entry_granules;
    table->entry_stride = layout->entry_bytes + (where == TAPFS_BITMAP_IN_ENTRY ? 8 : 0);
    table->entry_bits =
        where == TAPFS_BITMAP_IN_BLOCK || where == TAPFS_BITMAP_IN_TABLE ? layout->entry_granules / 8 : 0;
    while (table->reserved_count < RESERVED_RANGES && layout->reserved_end[table->reserved_count] != 0) {
        table->reserved_count++;
    }
    uint64_t entries = geometry->map_unit / table->span, bytes = entries * (table->entry_stride + table->entry_bits);
    for (table->pieces = 1; bytes / table->pieces > PIECE_BYTES && entries % (2 * table->pieces) == 0;) {
        table->pieces *= 2;
    }
}

int tapfs_disk_set_tables(tapfs_disk *disk, uint32_t index, const tapfs_table *layout, const uint64_t *places,
                          size_t count)
{
    struct layer *layer = disk_layer(disk, index);
    if (layer == NULL || layer->geometry.identity || layer->table != NULL ||
        !layout_valid(layout, layer) ||
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
    set_strides(table, &layer->geometry);
    table->writable = layer->geometry.writable;
    table->unit_count = count;
    atomic_init(&table->host_size, layout->host_size);
    atomic_init(&table->last_filled, UINT64_MAX - 1);
    for (size_t i = 0; i < count; i++) {
        atomic_init(&table->places[i], places[i]);
    }
    layer->table = table;
    layer->cached_unit = layer->geometry.map_unit / table->pieces;
    pthread_mutex_lock(&disk->cache.mutex);
    cache_forget(&disk->cache, index, 0, UINT64_MAX);
    pthread_mutex_unlock(&disk->cache.mutex);
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

uint64_t table_absent_until(const struct layer *layer, uint64_t offset, uint64_t end)
{
    uint64_t map_unit = layer->geometry.map_unit, unit = offset / map_unit;
    const struct table *table = layer->table;

    while (table != NULL && unit < table->unit_count && unit * map_unit < end &&
           atomic_load_explicit(&table->places[unit], memory_order_acquire) == TAPFS_TABLE_ABSENT) {
        unit++;
    }
    return unit == offset / map_unit ? offset : minimum(end, unit * map_unit);
}

uint8_t table_absent_kind(const struct layer *layer)
{
    return layer->table->layout.absent_kind;
}
