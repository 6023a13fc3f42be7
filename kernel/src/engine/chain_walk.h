/* A walk over the map of the whole chain, for the files of the engine that make something of it. */
#ifndef TAPFS_CHAIN_WALK_H
#define TAPFS_CHAIN_WALK_H

#include "engine/internal.h"

struct walk {
    struct request request;
    uint64_t lookups_left;
    /* Takes the next run and sets the position to its end. False ends the walk: the run is not needed, or only a part. */
    bool (*take)(struct walk *walk, const tapfs_mapped *run);
};

/*
 * Walk [offset, offset + length) of the disk; `take` and `lookups_left` are set. The runs ascend and are contiguous, and
 * two that belong together may come apart. It ends at the end of the range, where `take` says so, after so many looks at
 * the map, or with a MISS. `outcome->done` is the caller's to set from the position.
 */
TAPFS_INTERNAL void walk_chain(struct walk *walk, tapfs_disk *disk, uint64_t offset, uint64_t length,
                               tapfs_outcome *outcome);

#endif
