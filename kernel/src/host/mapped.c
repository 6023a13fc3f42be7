/*
 * A mapping of a file on tmpfs, whose bytes can be looked at without a copy. It is made once, when somebody asks for it,
 * as long as the file is then; what the file grows by later is not in it.
 */
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include "host/host.h"

struct host_mapping {
    uint8_t *memory;
    uint64_t length;
};

static struct host_mapping *make_mapping(const struct host_file *file)
{
    struct host_mapping *mapping = malloc(sizeof *mapping);
    uint64_t size = 0;

    if (mapping == NULL) {
        return NULL;
    }
    *mapping = (struct host_mapping){.memory = MAP_FAILED};
    if (host_size(file, &size) == 0 && size > 0 && size <= SIZE_MAX) {
        mapping->memory = mmap(NULL, (size_t)size, PROT_READ, MAP_SHARED, file->fd, 0);
        mapping->length = mapping->memory == MAP_FAILED ? 0 : size;
    }
    return mapping;
}

static void free_mapping(struct host_mapping *mapping)
{
    if (mapping != NULL && mapping->length > 0) {
        munmap(mapping->memory, (size_t)mapping->length);
    }
    free(mapping);
}

/* The one mapping of the file; threads that ask for the first time together agree on one of theirs. */
static const struct host_mapping *mapping_of(struct host_file *file)
{
    struct host_mapping *mapping = atomic_load(&file->mapping);

    if (mapping == NULL) {
        struct host_mapping *made = make_mapping(file);
        if (made == NULL || atomic_compare_exchange_strong(&file->mapping, &mapping, made)) {
            return made;
        }
        free_mapping(made);
    }
    return mapping;
}

void host_unmap(struct host_file *file)
{
    free_mapping(atomic_load(&file->mapping));
}

/* A touch of a page that is not there would take memory for a hole, or wait for what was swapped out. */
static bool is_resident(const uint8_t *bytes, uint64_t length, uint64_t page)
{
    uint8_t there[MAPPED_MAX / DIRECT_ALIGNMENT + 1];
    uintptr_t start = (uintptr_t)bytes / page * page;
    size_t pages = (size_t)(((uintptr_t)bytes + length - start + page - 1) / page);

    if (pages > sizeof there || mincore((void *)start, (size_t)(pages * page), there) != 0) {
        return false;
    }
    for (size_t i = 0; i < pages; i++) {
        if ((there[i] & 1) == 0) {
            return false;
        }
    }
    return true;
}

const uint8_t *host_mapped(struct host_file *file, uint64_t offset, uint64_t length)
{
    if (!file->in_memory || length == 0 || length > MAPPED_MAX || file->start != 0 || file->present != NULL ||
        atomic_load(&file->direct) || atomic_load(&file->cut_at) != UINT64_MAX) {
        return NULL;
    }
    const struct host_mapping *mapping = mapping_of(file);
    if (mapping == NULL || offset > mapping->length || length > mapping->length - offset) {
        return NULL;
    }
    const uint8_t *bytes = mapping->memory + offset;
    return is_resident(bytes, length, (uint64_t)sysconf(_SC_PAGESIZE)) ? bytes : NULL;
}
