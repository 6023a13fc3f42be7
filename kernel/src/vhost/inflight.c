/*
 * The in-flight region: which requests of a ring were taken and not answered, in memory that the front end keeps when this
 * process is killed. Its form is that of the vhost-user protocol, "Inflight I/O tracking", for split virtqueues.
 *
 * A request is marked before it is begun, in the order in which requests are taken, so those that are not marked still stand
 * in the available ring behind those that are. A batch of answers is chained from `last_batch_head` before the used
 * ring's index shows it. Then its marks are removed, then `used_index` is set. So after a kill in between the two indices
 * differ by the answers whose marks may be left. Doing a request again is harmless, for the guest has seen no answer.
 *
 * The region comes back by way of the front end, so each number in it is checked before it is used.
 */
#include <endian.h>
#include <errno.h>
#include <stdlib.h>

#include "vhost/internal.h"

#define VERSION 1u
/* Parts of a region begin at multiples of this. */
#define ALIGNMENT 64u

struct vhost_state {
    uint8_t marked;
    uint8_t padding[5];
    uint16_t next;
    uint64_t counter;
};

struct vhost_tracked {
    uint64_t features;
    uint16_t version, entries, last_batch_head, used_index;
    struct vhost_state states[];
};

uint64_t vhost_track_bytes(uint32_t entries)
{
    return round_up(sizeof(struct vhost_tracked) + entries * sizeof(struct vhost_state), ALIGNMENT);
}

/* Nothing that the compiler has before it comes after it: what a kill leaves is a prefix of our stores. */
static void in_this_order(void)
{
    atomic_signal_fence(memory_order_seq_cst);
}

/* A predecessor was killed after the used ring had shown answers, and before their marks were removed. */
static void finish_batch(struct vhost_tracked *tracked, uint32_t entries, uint16_t used_index)
{
    uint16_t count = (uint16_t)(used_index - tracked->used_index), head = tracked->last_batch_head;

    for (uint16_t i = 0; i < count && i < entries && head < entries; i++) {
        tracked->states[head].marked = 0;
        head = tracked->states[head].next;
    }
    in_this_order();
    tracked->used_index = used_index;
}

struct left {
    uint64_t counter;
    uint16_t head;
};

static int by_counter(const void *left, const void *right)
{
    const struct left *a = left, *b = right;
    return (a->counter > b->counter) - (a->counter < b->counter);
}

static int find_left(struct vhost_track *track, uint16_t *heads, uint32_t *count)
{
    struct left *found = calloc(track->entries, sizeof *found);
    if (found == NULL) {
        return ENOMEM;
    }
    *count = 0;
    for (uint32_t i = 0; i < track->entries; i++) {
        const struct vhost_state *state = &track->states->states[i];
        if (state->marked != 0) {
            found[(*count)++] = (struct left){.counter = state->counter, .head = (uint16_t)i};
            track->counter = maximum(track->counter, state->counter + 1);
        }
    }
    qsort(found, *count, sizeof *found, by_counter);
    for (uint32_t i = 0; i < *count; i++) {
        heads[i] = found[i].head;
    }
    free(found);
    return 0;
}

int vhost_track_open(struct vhost_track *track, uint8_t *memory, uint32_t room, uint32_t entries,
                     uint16_t used_index, uint16_t *heads, uint32_t *count)
{
    struct vhost_tracked *tracked = (struct vhost_tracked *)(void *)memory;

    if (tracked->version == 0) {
        tracked->entries = (uint16_t)room;
        tracked->used_index = used_index;
        in_this_order();
        tracked->version = VERSION;
    }
    if (tracked->version != VERSION || tracked->features != 0 || tracked->entries != room || entries > room) {
        return EINVAL;
    }
    *track = (struct vhost_track){.states = tracked, .entries = entries};
    finish_batch(tracked, entries, used_index);
    return find_left(track, heads, count);
}

void vhost_track_taken(struct vhost_track *track, uint16_t head)
{
    if (track->states != NULL) {
        struct vhost_state *state = &track->states->states[head];
        state->counter = track->counter++;
        in_this_order();
        state->marked = 1;
        in_this_order();
    }
}

void vhost_track_answered(struct vhost_track *track, uint16_t head)
{
    if (track->states != NULL) {
        track->states->states[head].next = track->states->last_batch_head;
        in_this_order();
        track->states->last_batch_head = head;
        in_this_order();
    }
}

void vhost_track_published(struct vhost_track *track, const uint16_t *heads, uint32_t count, uint16_t used_index)
{
    if (track->states != NULL) {
        in_this_order();
        for (uint32_t i = 0; i < count; i++) {
            track->states->states[heads[i]].marked = 0;
        }
        in_this_order();
        track->states->used_index = used_index;
    }
}

uint64_t tapfs_vhost_inflight_size(uint32_t rings, uint32_t entries)
{
    return rings * vhost_track_bytes(entries);
}

int tapfs_vhost_set_inflight(tapfs_vhost *device, int fd, uint64_t offset, uint64_t size, uint32_t rings,
                             uint32_t entries)
{
    struct vhost_region region = {.mapping = NULL};

    if (fd >= 0) {
        if (rings > TAPFS_VHOST_RINGS_MAX || entries > TAPFS_VHOST_ENTRIES_MAX || entries == 0 || offset % 8 != 0 ||
            size < tapfs_vhost_inflight_size(rings, entries)) {
            return -EINVAL;
        }
        int error = vhost_map(fd, offset, size, &region, &device->memory.gone);
        if (error != 0) {
            return -error;
        }
    }
    vhost_unmap(&device->inflight);
    device->inflight = region;
    device->inflight_rings = rings;
    device->inflight_entries = entries;
    return 0;
}
