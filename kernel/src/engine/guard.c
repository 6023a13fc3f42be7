/*
 * The places of a host file over which no guest data is written in place, whatever a table says: those of the format's
 * metadata. A damaged table may lead a write there.
 *
 * The places are asked for by each write, not once for each cached map. So a place that becomes metadata is guarded from
 * then on, and requests that began before have ended when a quiesce returns.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "engine/internal.h"

void guard_init(struct guard *guard)
{
    pthread_rwlock_init(&guard->lock, NULL);
}

void guard_destroy(struct guard *guard)
{
    pthread_rwlock_destroy(&guard->lock);
    free(guard->places);
    free(guard->ranges);
}

/* Whether each of these is a range of a host file that begins where the one before ends, or later. */
static bool ranges_ascend(const tapfs_range *ranges, size_t count)
{
    uint64_t end = 0;
    for (size_t i = 0; i < count; i++) {
        if (!in_host_range(ranges[i].offset, ranges[i].length) || ranges[i].offset < end) {
            return false;
        }
        end = ranges[i].offset + ranges[i].length;
    }
    return true;
}

static bool places_ascend(const uint64_t *places, size_t count, uint64_t size)
{
    for (size_t i = 0; i < count; i++) {
        if (!in_host_range(places[i], size) || (i > 0 && places[i] < places[i - 1])) {
            return false;
        }
    }
    return true;
}

static void *copy_of(const void *source, size_t bytes)
{
    void *copy = malloc(bytes + 1);
    if (copy != NULL && bytes > 0) {
        memcpy(copy, source, bytes);
    }
    return copy;
}

int tapfs_disk_guard(tapfs_disk *disk, uint32_t file, const tapfs_range *ranges, size_t range_count,
                     const uint64_t *places, size_t count, uint64_t size)
{
    struct layer *layer = disk_layer(disk, 0);
    if (layer == NULL || file >= layer->file_count || size == 0 || !ranges_ascend(ranges, range_count) ||
        !places_ascend(places, count, size)) {
        return -EINVAL;
    }
    tapfs_range *new_ranges = copy_of(ranges, range_count * sizeof *ranges);
    uint64_t *new_places = copy_of(places, count * sizeof *places);
    if (new_ranges == NULL || new_places == NULL) {
        free(new_ranges);
        free(new_places);
        return -ENOMEM;
    }
    struct guard *guard = &layer->guard;
    pthread_rwlock_wrlock(&guard->lock);
    tapfs_range *old_ranges = guard->ranges;
    uint64_t *old_places = guard->places;
    guard->ranges = new_ranges;
    guard->range_count = range_count;
    guard->places = new_places;
    guard->count = count;
    guard->size = size;
    guard->file = file;
    pthread_rwlock_unlock(&guard->lock);
    atomic_store(&guard->used, range_count + count > 0);
    free(old_ranges);
    free(old_places);
    return 0;
}

/* Of both lists it is the first one that ends behind `start`: if that is not in the range none is. */

static bool in_ranges(const struct guard *guard, uint64_t start, uint64_t end)
{
    size_t low = 0, high = guard->range_count;
    while (low < high) {
        size_t middle = low + (high - low) / 2;
        if (guard->ranges[middle].offset + guard->ranges[middle].length <= start) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return low < guard->range_count && guard->ranges[low].offset < end;
}

static bool in_places(const struct guard *guard, uint64_t start, uint64_t end)
{
    size_t low = 0, high = guard->count;
    while (low < high) {
        size_t middle = low + (high - low) / 2;
        if (guard->places[middle] + guard->size <= start) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return low < guard->count && guard->places[low] < end;
}

bool guarded(tapfs_disk *disk, const tapfs_extent *run)
{
    struct guard *guard = &disk->layers[0]->guard;
    uint64_t end = run->host_offset + run->length;

    if (!atomic_load(&guard->used)) {
        return false;
    }
    pthread_rwlock_rdlock(&guard->lock);
    bool found =
        run->file == guard->file && (in_places(guard, run->host_offset, end) || in_ranges(guard, run->host_offset, end));
    pthread_rwlock_unlock(&guard->lock);
    return found;
}
