/*
 * Count the references of table entries to clusters, one entry after the other.
 *
 * What is out of the ordinary is left to the caller, who names it. So everything that is counted here lies in the file.
 */
#include <endian.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "common.h"
#include "engine/references.h"

#define SECTOR 512u
#define SUBCLUSTERS 32u
/* A cluster is 2 MiB at most, and a payload is not longer than two of them. */
#define PAYLOAD_MAX ((UINT64_C(1) << 22) - 1)

enum entry_kind { REFERS_TO_NOTHING, REFERS_TO_CLUSTER, REFERS_TO_PAYLOAD, IS_ODD };

struct reference {
    enum entry_kind kind;
    bool owned;
    uint64_t first, last; /* clusters */
    uint64_t start;       /* of a payload */
    uint64_t bytes;       /* of data, packed or not */
};

static uint64_t load(const void *entries, size_t word)
{
    uint64_t value;
    memcpy(&value, (const uint8_t *)entries + word * sizeof value, sizeof value);
    return be64toh(value);
}

static bool in_reserved(const tapfs_references *layout, uint64_t start, uint64_t end)
{
    for (size_t i = 0; i < sizeof layout->reserved / sizeof layout->reserved[0]; i += 2) {
        if (start < layout->reserved[i + 1] && layout->reserved[i] < end) {
            return true;
        }
    }
    return false;
}

static struct reference payload_of(const tapfs_references *layout, uint64_t word, uint64_t bitmap)
{
    struct reference found = {.kind = IS_ODD};
    uint64_t start = word & layout->packed_place_mask;
    uint64_t field = word >> layout->packed_length_shift & layout->packed_length_mask;
    uint64_t most = layout->packed_bytes != 0 ? maximum(field, 1) : (field + 1) * SECTOR - start % SECTOR;

    if ((word & layout->packed_impossible_mask) != 0 || bitmap != 0 || start < layout->least_place ||
        start >= layout->file_size) {
        return found;
    }
    uint64_t length = minimum(most, layout->file_size - start);
    if (in_reserved(layout, start, start + length)) {
        return found;
    }
    found.kind = REFERS_TO_PAYLOAD;
    found.start = start;
    found.first = start >> layout->cluster_bits;
    found.last = (start + length - 1) >> layout->cluster_bits;
    found.bytes = minimum(length, PAYLOAD_MAX);
    return found;
}

static struct reference cluster_of(const tapfs_references *layout, uint64_t word, uint64_t bitmap)
{
    struct reference found = {.kind = IS_ODD, .owned = (word & layout->owned_mask) != 0};
    uint64_t place = word & layout->place_mask, cluster = UINT64_C(1) << layout->cluster_bits;
    uint32_t allocated = (uint32_t)bitmap;

    if ((word & layout->impossible_mask) != 0 || (allocated & bitmap >> SUBCLUSTERS) != 0) {
        return found;
    }
    if (place == 0) {
        found.kind = layout->bitmaps != 0 && allocated != 0 ? IS_ODD : REFERS_TO_NOTHING;
        return found;
    }
    if (place % cluster != 0 || place < layout->least_place || place >= layout->file_size ||
        in_reserved(layout, place, place + cluster)) {
        return found;
    }
    uint64_t placed = 0; /* up to the end of the data */
    if (layout->bitmaps != 0) {
        placed = allocated == 0 ? 0 : (SUBCLUSTERS - (uint64_t)__builtin_clz(allocated)) * (cluster / SUBCLUSTERS);
        found.bytes = (uint64_t)__builtin_popcount(allocated) * (cluster / SUBCLUSTERS);
    } else if ((word & layout->zero_mask) == 0) {
        placed = found.bytes = cluster;
    }
    if (place + placed > layout->file_size) {
        return found; /* the caller knows whether the disk ends in it, too */
    }
    found.kind = REFERS_TO_CLUSTER;
    found.first = found.last = place >> layout->cluster_bits;
    return found;
}

static inline struct reference reference_of(const tapfs_references *layout, const void *entries, size_t index)
{
    uint64_t word, bitmap = 0;

    if (layout->bitmaps != 0) {
        word = load(entries, 2 * index);
        bitmap = load(entries, 2 * index + 1);
    } else {
        word = load(entries, index);
    }
    return (word & layout->packed_mask) != 0 ? payload_of(layout, word, bitmap) : cluster_of(layout, word, bitmap);
}

static bool fits(const tapfs_counted *counted, uint64_t cluster, uint32_t times)
{
    uint64_t at = cluster - counted->base;
    return at >= counted->clusters || counted->width != 1 ||
           ((const uint8_t *)counted->counts)[at] + (uint64_t)times < UINT8_MAX;
}

/* Count one more reference, or `times`; a cluster of another window only says that there is one. */
static void count(tapfs_counted *counted, uint64_t cluster, uint32_t times, uint64_t window)
{
    uint64_t at = cluster - counted->base;

    if (at >= counted->clusters) {
        counted->windows[window] = 1;
    } else if (counted->width == 1) {
        uint8_t *counter = (uint8_t *)counted->counts + at;
        *counter = (uint8_t)(*counter + times);
    } else {
        uint16_t *counter = (uint16_t *)counted->counts + at;
        *counter = (uint16_t)minimum(*counter + (uint64_t)times, UINT16_MAX);
    }
}

size_t tapfs_count_references(const tapfs_references *layout, const void *entries, size_t first, size_t stop,
                              uint32_t times, tapfs_counted *counted)
{
    counted->full = 0;
    for (size_t index = first; index < stop; index++) {
        struct reference found = reference_of(layout, entries, index);
        if (found.kind == REFERS_TO_NOTHING) {
            continue;
        }
        if (found.kind == IS_ODD || found.last >> counted->window_bits >= counted->window_count) {
            return index;
        }
        if (found.owned && counted->skip_owned != 0) {
            continue;
        }
        for (uint64_t cluster = found.first; cluster <= found.last; cluster++) {
            if (!fits(counted, cluster, times)) {
                counted->full = 1;
                return index;
            }
        }
        for (uint64_t cluster = found.first; cluster <= found.last; cluster++) {
            count(counted, cluster, times, cluster >> counted->window_bits);
        }
        counted->data_bytes += found.bytes;
        counted->shared += found.kind == REFERS_TO_CLUSTER && !found.owned;
    }
    return stop;
}

static bool is_marked(const uint8_t *marks, uint64_t at)
{
    return (marks[at / 8] >> at % 8 & 1) != 0;
}

static void mark(uint8_t *marks, uint64_t at)
{
    marks[at / 8] = (uint8_t)(marks[at / 8] | 1u << at % 8);
}

/* Whether one more reference to a cluster leaves each that is owned with one alone. It is marked then. */
static bool mark_cluster(tapfs_owners *owners, uint64_t cluster, bool owned)
{
    uint64_t at = cluster - owners->base;

    if (at >= owners->clusters) {
        owners->windows[cluster >> owners->window_bits] = 1;
        return true;
    }
    if (is_marked(owners->alone, at) || (owned && owners->shared != 0 && is_marked(owners->others, at))) {
        return false;
    }
    mark(owned ? owners->alone : owners->others, at);
    return true;
}

size_t tapfs_mark_owners(const tapfs_references *layout, const void *entries, size_t first, size_t stop,
                         tapfs_owners *owners)
{
    owners->doubled = 0;
    for (size_t index = first; index < stop; index++) {
        struct reference found = reference_of(layout, entries, index);
        if (found.kind == REFERS_TO_NOTHING) {
            continue;
        }
        if (found.kind == IS_ODD || found.last >> owners->window_bits >= owners->window_count) {
            return index;
        }
        bool plain = found.kind == REFERS_TO_CLUSTER, says = plain && found.owned;
        bool owned = plain && (owners->table == TAPFS_TABLE_SOLE || (says && owners->table == TAPFS_TABLE_OWN));
        owners->shared += !owned;
        for (uint64_t cluster = found.first; cluster <= found.last; cluster++) {
            if ((says && owners->table == TAPFS_TABLE_SHARED) || !mark_cluster(owners, cluster, owned)) {
                owners->doubled = 1;
                return index;
            }
        }
    }
    return stop;
}

size_t tapfs_gather_payloads(const tapfs_references *layout, const void *entries, size_t first, size_t stop,
                             uint64_t low, uint64_t high, tapfs_payload *found, size_t room, size_t *count)
{
    for (size_t index = first; index < stop; index++) {
        struct reference each = reference_of(layout, entries, index);
        if (each.kind != REFERS_TO_PAYLOAD || each.start < low || each.start >= high) {
            continue;
        }
        if (*count == room) {
            return index;
        }
        found[(*count)++] = (tapfs_payload){.start = each.start, .length = each.bytes};
    }
    return stop;
}

static int by_start(const void *left, const void *right)
{
    uint64_t one = ((const tapfs_payload *)left)->start, other = ((const tapfs_payload *)right)->start;
    return (one > other) - (one < other);
}

uint64_t tapfs_overlapping_payload(tapfs_payload *payloads, size_t count, uint64_t *end)
{
    qsort(payloads, count, sizeof *payloads, by_start);
    for (size_t at = 0; at < count; at++) {
        if (payloads[at].start < *end) {
            return payloads[at].start;
        }
        *end = payloads[at].start + payloads[at].length;
    }
    return UINT64_MAX;
}

size_t tapfs_find_ownership(const tapfs_references *layout, const void *entries, size_t first, size_t stop,
                            uint64_t base, uint64_t clusters, const uint8_t *alone)
{
    for (size_t index = first; index < stop; index++) {
        struct reference found = reference_of(layout, entries, index);
        uint64_t at = found.first - base;
        if (found.kind == IS_ODD ||
            (found.kind == REFERS_TO_CLUSTER && at < clusters && found.owned != (alone[at] != 0))) {
            return index;
        }
    }
    return stop;
}

size_t tapfs_mark_owned(const tapfs_references *layout, void *entries, size_t first, size_t stop, uint64_t base,
                        uint64_t clusters, const uint8_t *alone)
{
    const uint64_t mask = htobe64(layout->owned_mask);
    size_t changed = 0;

    for (size_t index = first; index < stop; index++) {
        struct reference found = reference_of(layout, entries, index);
        uint64_t at = found.first - base;
        if (found.kind == REFERS_TO_CLUSTER && !found.owned && at < clusters && alone[at] != 0) {
            uint8_t *entry = (uint8_t *)entries + (layout->bitmaps != 0 ? 2 * index : index) * sizeof mask;
            uint64_t word;
            memcpy(&word, entry, sizeof word);
            word |= mask;
            memcpy(entry, &word, sizeof word);
            changed++;
        }
    }
    return changed;
}
