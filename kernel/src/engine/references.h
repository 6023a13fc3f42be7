/* References from the entries of a format's tables to clusters of the file, counted for a check without Python. */
#ifndef TAPFS_REFERENCES_H
#define TAPFS_REFERENCES_H

#include <stddef.h>
#include <stdint.h>

/* cffi: begin */

/*
 * Big-endian entries of 8 bytes. With `bitmaps` a word of 32 allocated bits (the low ones) and 32 zero bits follows each.
 * An entry with a bit of `packed_mask` refers to a payload: sectors of 512 bytes, their number less one is the field
 * `packed_length_mask` at `packed_length_shift`; or bytes, with `packed_bytes`. Every other one refers to the cluster at `place_mask`, or to nothing if
 * that is 0. It holds data unless a bit of `zero_mask` is set. With a bit of `impossible_mask`, or a packed one with a bit
 * of `packed_impossible_mask`, an entry cannot be true. Nor can one whose data the end of the file cuts.
 */
typedef struct {
    uint64_t place_mask;
    uint64_t zero_mask;
    uint64_t impossible_mask;
    uint64_t owned_mask; /* the entry says that its cluster has one reference */
    uint64_t packed_mask;
    uint64_t packed_impossible_mask;
    uint64_t packed_place_mask;
    uint64_t packed_length_mask;
    uint64_t packed_length_shift;
    uint64_t file_size;
    uint64_t least_place;
    uint64_t reserved[6]; /* three ranges [start, stop) in which nothing can lie */
    uint32_t cluster_bits;
    uint32_t bitmaps;
    uint32_t packed_bytes;
} tapfs_references;

/* The counted clusters: `clusters` of them from number `base` on, each with a counter of `width` (1, 2) bytes. */
typedef struct {
    uint64_t base;
    uint64_t clusters;
    void *counts;
    uint8_t *windows; /* of 2^`window_bits` clusters each, by number: 1 where an entry refers to another one than this */
    uint64_t window_count;
    uint32_t window_bits;
    uint32_t width;
    uint32_t full; /* a counter of one byte would overflow */
    uint32_t skip_owned; /* an entry that says that it owns its cluster is not counted */
    uint64_t data_bytes; /* of packed payloads, too */
    uint64_t shared;     /* entries that do not say that they own their cluster */
} tapfs_counted;

/*
 * Count the references of the entries [first, stop) `times` times each. The index of an entry at which it ended, or `stop`:
 * one that cannot be true or refers to a window without a number, or one that does not fit (`full`). A counter of two
 * bytes stays at its largest number.
 */
size_t tapfs_count_references(const tapfs_references *layout, const void *entries, size_t first, size_t stop,
                              uint32_t times, tapfs_counted *counted);

/* What the entries of a table are worth that say that they own their cluster. */
enum {
    TAPFS_TABLE_FOREIGN = 0, /* nothing: the table is a snapshot's */
    TAPFS_TABLE_OWN = 1,
    TAPFS_TABLE_SHARED = 2, /* they are wrong: several places of the disk have the table */
    TAPFS_TABLE_SOLE = 3    /* all entries own their cluster, or the image is wrong */
};

/* Which of the clusters from number `base` on are referred to: bit n % 8 of byte n / 8 for each, `clusters` in all. */
typedef struct {
    uint64_t base;
    uint64_t clusters;
    uint8_t *alone;   /* by an entry that owns it */
    uint8_t *others;  /* by entries that do not say so */
    uint8_t *windows; /* as in tapfs_counted */
    uint64_t window_count;
    uint32_t window_bits;
    uint32_t table;   /* TAPFS_TABLE_... */
    uint32_t doubled; /* the entry at which it ended owns what another one refers to, or refers to what another one owns */
    uint32_t reserved;
    uint64_t shared; /* entries that refer to clusters and do not own them */
} tapfs_owners;

/*
 * Note what the entries [first, stop) refer to. The index of the entry at which it ended, or `stop`: a `doubled` one, one
 * that cannot be true, or one that refers to a window without a number. A bit for each cluster fits a processor's
 * cache where counters do not: that is why this is not done by counting.
 */
size_t tapfs_mark_owners(const tapfs_references *layout, const void *entries, size_t first, size_t stop,
                         tapfs_owners *owners);

/* The bytes of the file that a packed entry refers to. */
typedef struct {
    uint64_t start;
    uint64_t length;
} tapfs_payload;

/*
 * Put the payloads of [first, stop) that begin in [low, high) of the file behind the `*count` of `found`, which has room
 * for `room`. Other entries are passed over. The index of the entry for which there was no room, or `stop`.
 */
size_t tapfs_gather_payloads(const tapfs_references *layout, const void *entries, size_t first, size_t stop,
                             uint64_t low, uint64_t high, tapfs_payload *found, size_t room, size_t *count);
/*
 * Sort payloads by where they begin. The place of the first that begins before `*end` or before the end of one that is
 * before it, or UINT64_MAX; `*end` becomes the largest end.
 */
uint64_t tapfs_overlapping_payload(tapfs_payload *payloads, size_t count, uint64_t *end);

/*
 * The first entry of [first, stop) that cannot be true, or of whose cluster in the window `alone` (a byte each) says
 * other than the entry; or `stop`.
 */
size_t tapfs_find_ownership(const tapfs_references *layout, const void *entries, size_t first, size_t stop,
                            uint64_t base, uint64_t clusters, const uint8_t *alone);
/*
 * Have each entry of [first, stop) say that it owns its cluster, where that is a cluster of the window whose byte in
 * `alone` is not 0. Entries that cannot be true stay. How many were changed.
 */
size_t tapfs_mark_owned(const tapfs_references *layout, void *entries, size_t first, size_t stop, uint64_t base,
                        uint64_t clusters, const uint8_t *alone);

/*
 * Counters that stand on the disk, of 2^`order` bits (0 to 6): big-endian, or several in a byte from its lowest bit on.
 * `times` has a number of `width` (1, 2) bytes for each: so much is added, or taken away. Where one has changed,
 * `sectors` gets a 1 for its sector of 512 bytes.
 *
 * Raise `count` counters. The index of one that is 0 or would get too large, which stays as it is like those behind it;
 * or `count`.
 */
size_t tapfs_raise_counts(void *counters, uint32_t order, const void *times, uint32_t width, size_t count,
                          uint8_t *sectors);
/*
 * The first of `count` counters from number `first` on that is 0 though bit `mark` and following of `marks` say that its
 * cluster is referred to; or `count`.
 */
size_t tapfs_find_uncounted(const void *counters, uint32_t order, size_t first, size_t count, const uint8_t *marks,
                            uint64_t mark);
/* Lower `count` counters, none below 0. `freed` gets a 1 for each that has become 0. How many these are. */
size_t tapfs_lower_counts(void *counters, uint32_t order, const void *times, uint32_t width, size_t count,
                          uint8_t *sectors, uint8_t *freed);

/* cffi: end */

#endif
