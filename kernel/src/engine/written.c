/*
 * Marks of what was written to a disk since its owner last took them, one for each unit of the disk.
 *
 * A mark is set when a write has ended, well or not: whoever takes a mark and then reads the unit sees at least the write
 * that had set it. A write that is under way sets its mark later. So the marks are complete where no request is running.
 */
#include <errno.h>
#include <stdlib.h>

#include "engine/internal.h"

#define WORD_BITS 64u

struct written {
    atomic_bool on;
    uint64_t unit;
    uint64_t size;  /* bytes of the disk */
    uint64_t words; /* of `marks` */
    _Atomic uint64_t marks[];
};

int tapfs_disk_track(tapfs_disk *disk, uint64_t unit)
{
    const struct layer *top = disk_layer(disk, 0);
    struct written *written = atomic_load(&disk->written);

    if (top == NULL || unit == 0) {
        return -EINVAL;
    }
    if (written == NULL) {
        uint64_t size = top->geometry.virtual_size;
        uint64_t words = size / unit / WORD_BITS + 1;
        if (words > (SIZE_MAX - sizeof *written) / sizeof *written->marks) {
            return -ENOMEM;
        }
        written = calloc(1, sizeof *written + words * sizeof *written->marks);
        if (written == NULL) {
            return -ENOMEM;
        }
        written->unit = unit;
        written->size = size;
        written->words = words;
    } else if (written->unit != unit) {
        return -EINVAL;
    }
    for (uint64_t i = 0; i < written->words; i++) {
        atomic_store(&written->marks[i], 0);
    }
    atomic_store(&written->on, true);
    atomic_store(&disk->written, written);
    return 0;
}

void tapfs_disk_untrack(tapfs_disk *disk)
{
    /* The marks stay until the disk goes: a request may be about to set one. */
    struct written *written = atomic_load(&disk->written);
    if (written != NULL) {
        atomic_store(&written->on, false);
    }
}

void tapfs_disk_note_written(tapfs_disk *disk, uint64_t offset, uint64_t length)
{
    struct written *written = atomic_load(&disk->written);

    if (written == NULL || !atomic_load(&written->on) || length == 0 || offset >= written->size) {
        return;
    }
    uint64_t last = (offset + minimum(length, written->size - offset) - 1) / written->unit;
    for (uint64_t mark = offset / written->unit; mark <= last;) {
        uint64_t first = mark % WORD_BITS;
        uint64_t count = minimum(WORD_BITS - first, last - mark + 1);
        uint64_t bits = (count == WORD_BITS ? UINT64_MAX : ((uint64_t)1 << count) - 1) << first;
        _Atomic uint64_t *word = &written->marks[mark / WORD_BITS];
        if ((atomic_load(word) & bits) != bits) {
            atomic_fetch_or(word, bits);
        }
        mark += count;
    }
}

uint64_t tapfs_disk_written(const tapfs_disk *disk)
{
    struct written *written = atomic_load(&disk->written);
    uint64_t count = 0;

    for (uint64_t i = 0; written != NULL && i < written->words; i++) {
        count += (uint64_t)__builtin_popcountll(atomic_load(&written->marks[i]));
    }
    return written == NULL ? 0 : minimum(count * written->unit, written->size);
}

/* False: there is no room for one more range. */
static bool add_unit(const struct written *written, uint64_t mark, tapfs_range *ranges, size_t capacity, size_t *count)
{
    uint64_t offset = mark * written->unit;
    uint64_t length = minimum(written->unit, written->size - offset);
    tapfs_range *last = *count > 0 ? &ranges[*count - 1] : NULL;

    if (last != NULL && last->offset + last->length == offset) {
        last->length += length;
        return true;
    }
    if (*count == capacity) {
        return false;
    }
    ranges[(*count)++] = (tapfs_range){.offset = offset, .length = length};
    return true;
}

size_t tapfs_disk_take_written(tapfs_disk *disk, tapfs_range *ranges, size_t capacity)
{
    struct written *written = atomic_load(&disk->written);
    size_t count = 0;

    for (uint64_t i = 0; written != NULL && i < written->words; i++) {
        uint64_t left = atomic_load(&written->marks[i]) == 0 ? 0 : atomic_exchange(&written->marks[i], 0);
        while (left != 0) {
            uint64_t bit = (uint64_t)__builtin_ctzll(left);
            if (!add_unit(written, i * WORD_BITS + bit, ranges, capacity, &count)) {
                atomic_fetch_or(&written->marks[i], left);
                return count;
            }
            left &= left - 1;
        }
    }
    return count;
}

void written_free(tapfs_disk *disk)
{
    free(atomic_load(&disk->written));
}
