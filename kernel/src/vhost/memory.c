/* The guest's memory: regions of files, mapped, and where the addresses of the guest and of the front end lie in them. */
#include <errno.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "vhost/internal.h"

/* What the host maps of a file begins and ends at multiples of this: its pages, which may be huge. */
static uint64_t page_of(const struct stat *status)
{
    uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE);
    uint64_t block = status->st_blksize > 0 ? (uint64_t)status->st_blksize : 0;
    return block > page && (block & (block - 1)) == 0 ? block : page;
}

int vhost_map(int fd, uint64_t offset, uint64_t size, struct vhost_region *region, atomic_bool *gone)
{
    struct stat status;

    if (fstat(fd, &status) < 0) {
        return errno;
    }
    if (!S_ISREG(status.st_mode) || size == 0 || !in_host_range(offset, size) ||
        offset + size > (uint64_t)status.st_size) {
        return EINVAL;
    }
    uint64_t page = page_of(&status), start = round_down(offset, page), end = offset + size;
    if (end > INT64_MAX - page) {
        return EINVAL;
    }
    size_t mapped = round_up(end, page) - start;
    void *mapping = mmap(NULL, mapped, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd, (off_t)start);
    if (mapping == MAP_FAILED) {
        return errno;
    }
    if (!vhost_guard(mapping, mapped, gone)) {
        munmap(mapping, mapped);
        return ENOSPC;
    }
    /* A core dump of ours is no place for it, and neither is a child. */
    madvise(mapping, mapped, MADV_DONTDUMP);
    region->mapping = mapping;
    region->mapped = mapped;
    region->memory = (uint8_t *)mapping + (offset - start);
    return 0;
}

void vhost_unmap(struct vhost_region *region)
{
    if (region->mapping != NULL) {
        vhost_unguard(region->mapping);
        munmap(region->mapping, region->mapped);
        *region = (struct vhost_region){.mapping = NULL};
    }
}

static bool wraps(uint64_t start, uint64_t size)
{
    return size > UINT64_MAX - start;
}

int tapfs_vhost_add_region(tapfs_vhost *device, const tapfs_vhost_region *told, int fd)
{
    struct vhost_memory *memory = &device->memory;

    if (wraps(told->guest, told->size) || wraps(told->user, told->size)) {
        return -EINVAL;
    }
    if (memory->count == TAPFS_VHOST_REGIONS_MAX) {
        return -ENOSPC;
    }
    for (uint32_t i = 0; i < memory->count; i++) {
        const tapfs_vhost_region *other = &memory->regions[i].told;
        if (told->guest < other->guest + other->size && other->guest < told->guest + told->size) {
            return -EEXIST;
        }
    }
    struct vhost_region *region = &memory->regions[memory->count];
    *region = (struct vhost_region){.told = *told};
    int error = vhost_map(fd, told->offset, told->size, region, &memory->gone);
    memory->count += error == 0;
    return -error;
}

int tapfs_vhost_remove_region(tapfs_vhost *device, const tapfs_vhost_region *told)
{
    struct vhost_memory *memory = &device->memory;

    for (uint32_t i = 0; i < memory->count; i++) {
        const tapfs_vhost_region *other = &memory->regions[i].told;
        if (other->guest == told->guest && other->user == told->user && other->size == told->size) {
            vhost_unmap(&memory->regions[i]);
            memory->regions[i] = memory->regions[--memory->count];
            return 0;
        }
    }
    return -ENOENT;
}

void tapfs_vhost_remove_regions(tapfs_vhost *device)
{
    struct vhost_memory *memory = &device->memory;

    while (memory->count > 0) {
        vhost_unmap(&memory->regions[--memory->count]);
    }
    atomic_store(&memory->gone, false);
}

static uint8_t *in_region(const struct vhost_region *region, uint64_t address, uint64_t *length)
{
    uint64_t inner = address - region->told.guest;
    if (address < region->told.guest || inner >= region->told.size) {
        return NULL;
    }
    *length = minimum(*length, region->told.size - inner);
    return region->memory + inner;
}

uint8_t *vhost_guest_memory(const struct vhost_memory *memory, uint64_t address, uint64_t *length, uint32_t *hint)
{
    uint8_t *found = *hint < memory->count ? in_region(&memory->regions[*hint], address, length) : NULL;

    for (uint32_t i = 0; i < memory->count && found == NULL; i++) {
        found = in_region(&memory->regions[i], address, length);
        if (found != NULL) {
            *hint = i;
        }
    }
    return found;
}

void *vhost_user_memory(const struct vhost_memory *memory, uint64_t address, uint64_t length, size_t alignment)
{
    for (uint32_t i = 0; i < memory->count; i++) {
        const struct vhost_region *region = &memory->regions[i];
        uint64_t inner = address - region->told.user;
        if (address < region->told.user || inner >= region->told.size) {
            continue;
        }
        uint8_t *found = region->memory + inner;
        bool fits = length <= region->told.size - inner && (uintptr_t)found % alignment == 0;
        return fits ? found : NULL;
    }
    return NULL;
}
