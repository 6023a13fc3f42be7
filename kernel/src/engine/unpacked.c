/*
 * Unpacked units that are kept, because a unit is read in many parts: those wanted last, as many as there is room for. What
 * the map leaves of its bound is theirs, too, so a small map of a large image leaves much.
 */
#include <stdlib.h>
#include <string.h>

#include "engine/internal.h"

struct unpacked {
    struct unpacked *next;          /* in its bucket */
    struct unpacked *newer, *older; /* in the order in which they were wanted */
    uint8_t *data;
    uint64_t host_offset, host_length;
    uint64_t unit; /* bytes of `data` */
    uint64_t end;  /* bytes that may be taken from it */
    uint32_t layer, file;
};

static struct unpacked **bucket_of(struct unpacked_units *units, uint64_t host_offset)
{
    /* Payloads may begin at any byte; the high bits of the product depend on all of them. */
    return &units->buckets[host_offset * UINT64_C(0x9E3779B97F4A7C15) >> (64 - UNPACKED_BUCKET_BITS)];
}

static bool is_of(const struct unpacked *each, const struct codec_source *source)
{
    return each->host_offset == source->host_offset && each->host_length == source->host_length &&
           each->layer == source->layer_index && each->file == source->file_index;
}

static void become_newest(struct unpacked_units *units, struct unpacked *each)
{
    each->older = units->newest;
    each->newer = NULL;
    if (units->newest != NULL) {
        units->newest->newer = each;
    } else {
        units->oldest = each;
    }
    units->newest = each;
}

static void leave_order(struct unpacked_units *units, struct unpacked *each)
{
    *(each->newer != NULL ? &each->newer->older : &units->newest) = each->older;
    *(each->older != NULL ? &each->older->newer : &units->oldest) = each->newer;
}

static void let_go(struct unpacked_units *units, struct unpacked *each)
{
    struct unpacked **place = bucket_of(units, each->host_offset);
    while (*place != each) {
        place = &(*place)->next;
    }
    *place = each->next;
    leave_order(units, each);
    units->bytes -= each->unit;
    free(each->data);
    free(each);
}

static uint64_t room(const struct unpacked_units *units)
{
    uint64_t taken = atomic_load_explicit(&units->map->taken, memory_order_relaxed);
    return units->own + (taken < units->map->limit ? units->map->limit - taken : 0);
}

/* With the mutex held: let those go that were wanted longest ago, until there is room, but never `kept`. */
static void make_room(struct unpacked_units *units, const struct unpacked *kept)
{
    uint64_t limit = room(units);

    while (units->bytes > limit && units->oldest != kept) {
        let_go(units, units->oldest);
    }
}

void unpacked_shrink(struct unpacked_units *units)
{
    if (atomic_load_explicit(&units->bytes, memory_order_relaxed) > room(units)) {
        pthread_mutex_lock(&units->mutex);
        make_room(units, NULL);
        pthread_mutex_unlock(&units->mutex);
    }
}

void unpacked_init(struct unpacked_units *units, uint64_t own, const struct cache *map)
{
    *units = (struct unpacked_units){.own = own, .map = map};
    pthread_mutex_init(&units->mutex, NULL);
}

void unpacked_destroy(struct unpacked_units *units)
{
    while (units->oldest != NULL) {
        let_go(units, units->oldest);
    }
    free(units->buckets);
    pthread_mutex_destroy(&units->mutex);
}

bool unpacked_copy(struct unpacked_units *units, const struct codec_source *source, uint8_t *buffer, uint64_t inner,
                   uint64_t length)
{
    pthread_mutex_lock(&units->mutex);
    struct unpacked *each = units->buckets == NULL ? NULL : *bucket_of(units, source->host_offset);
    while (each != NULL && !(is_of(each, source) && inner + length <= each->end)) {
        each = each->next;
    }
    if (each != NULL) {
        memcpy(buffer, each->data + inner, length);
        leave_order(units, each);
        become_newest(units, each);
    }
    pthread_mutex_unlock(&units->mutex);
    return each != NULL;
}

uint8_t *unpacked_memory(struct unpacked_units *units, uint64_t unit)
{
    uint8_t *data = NULL;

    pthread_mutex_lock(&units->mutex);
    struct unpacked *oldest = units->oldest;
    if (oldest != NULL && oldest->unit == unit && units->bytes + unit > room(units)) {
        data = oldest->data;
        oldest->data = NULL;
        let_go(units, oldest);
    }
    pthread_mutex_unlock(&units->mutex);
    return data != NULL ? data : malloc(unit);
}

void unpacked_keep(struct unpacked_units *units, const struct codec_source *source, uint8_t *data, uint64_t end)
{
    struct unpacked *kept = malloc(sizeof *kept);

    pthread_mutex_lock(&units->mutex);
    if (units->buckets == NULL) {
        units->buckets = calloc((size_t)1 << UNPACKED_BUCKET_BITS, sizeof(struct unpacked *));
    }
    if (kept == NULL || units->buckets == NULL) {
        pthread_mutex_unlock(&units->mutex);
        free(kept);
        free(data);
        return;
    }
    struct unpacked **bucket = bucket_of(units, source->host_offset);
    *kept = (struct unpacked){
        .next = *bucket,
        .data = data,
        .host_offset = source->host_offset,
        .host_length = source->host_length,
        .unit = source->unit,
        .end = end,
        .layer = source->layer_index,
        .file = source->file_index,
    };
    *bucket = kept;
    become_newest(units, kept);
    units->bytes += kept->unit;
    for (struct unpacked *each = kept->next, *next; each != NULL; each = next) {
        next = each->next;
        if (is_of(each, source)) { /* another thread has unpacked it, too, or less of it */
            let_go(units, each);
        }
    }
    make_room(units, kept);
    pthread_mutex_unlock(&units->mutex);
}

void unpacked_drop_layer(struct unpacked_units *units, uint32_t layer)
{
    pthread_mutex_lock(&units->mutex);
    for (struct unpacked *each = units->oldest, *newer; each != NULL; each = newer) {
        newer = each->newer;
        if (each->layer == layer) {
            let_go(units, each);
        }
    }
    pthread_mutex_unlock(&units->mutex);
}
