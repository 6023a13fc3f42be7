/*
 * One map unit in the cache: packed runs, or the bytes of its table where those are fewer. cache.c finds units and keeps
 * them within their bound, unit.c knows what is in one.
 */
#ifndef TAPFS_UNIT_H
#define TAPFS_UNIT_H

#include "engine/internal.h"
#include "engine/tables.h"

/*
 * A run in 16 bytes; it ends where the next one starts.
 * low: start in the unit (30 bits), kind (2), DATA: file (32), COMPRESSED: host_length (22), file (10)
 * high: host_offset (63), in_place (1)
 */
struct packed_run {
    uint64_t low, high;
};

struct unit {
    struct unit *chain;
    struct unit *newer, *older;
    uint64_t index;
    uint64_t born; /* the clock of insertions when it was inserted, or first wanted */
    const struct table *table; /* NULL: runs; else the bytes of the unit's table */
    uint32_t layer;
    uint32_t length; /* bytes of the disk that it covers */
    uint32_t count;  /* runs, or bytes of the table */
    uint32_t skip;   /* `skip` of the first run; others begin where their payload does */
    bool proven;     /* wanted again long after it was inserted */
    bool ahead;      /* read with another, and not wanted yet */
    bool merged;     /* behind the runs stands the layer of each, a byte */
    struct packed_run runs[];
};

/* What a unit costs beyond itself: its share of the buckets and the allocator's header. */
#define UNIT_OVERHEAD 32u

static inline uint64_t unit_bytes(const struct unit *unit)
{
    uint64_t content = unit->table != NULL ? unit->count
                                           : (uint64_t)unit->count * (sizeof unit->runs[0] + (unit->merged ? 1 : 0));
    return sizeof *unit + UNIT_OVERHEAD + content;
}

static inline uint8_t *unit_table(struct unit *unit)
{
    return (uint8_t *)unit->runs;
}

/* The layers of the runs of a merged unit. */
static inline uint8_t *unit_layers(struct unit *unit)
{
    return (uint8_t *)(unit->runs + unit->count);
}

/* Whether `right` continues `left`, so that both are one run. */
TAPFS_INTERNAL bool extents_join(const tapfs_extent *left, const tapfs_extent *right);
/* A unit with room for a table of that many bytes; NULL without memory. */
TAPFS_INTERNAL struct unit *unit_for_table(const struct table *table, uint32_t layer, uint64_t index, uint32_t length,
                                           uint32_t bytes);
/* A unit that is one run without a place. */
TAPFS_INTERNAL struct unit *unit_of_kind(uint8_t kind, uint32_t layer, uint64_t index, uint32_t length);
/* The same with runs instead of the table, if that is smaller; takes the unit over. */
TAPFS_INTERNAL struct unit *unit_compacted(struct unit *unit);
/* Of a layer, or of the chain (MERGED_LAYER): the runs of [start, stop) from extents[*first] on, which is moved to the last one that ends after `start`. */
TAPFS_INTERNAL struct unit *unit_of_extents(uint32_t layer, uint64_t index, const tapfs_extent *extents, size_t count,
                                            size_t *first, uint64_t start, uint64_t stop);
/* The runs of [inner, stop) of a unit that begins at `base`, clipped (a COMPRESSED run keeps its payload). */
TAPFS_INTERNAL size_t unit_lookup(const struct unit *unit, uint64_t base, uint64_t inner, uint64_t stop,
                                  tapfs_extent *runs, size_t capacity);
/* The unit with the map of the extents' range, as far as it goes, replaced; NULL without memory. */
TAPFS_INTERNAL struct unit *unit_patched(const struct unit *unit, uint64_t base, const tapfs_extent *extents,
                                         size_t count);

#endif
