/*
 * A split virtqueue as memory that the guest shares: virtio 1.2, 2.7. Numbers are little endian. What the guest can change
 * is loaded once, and our own indices are never read back.
 */
#include <endian.h>

#include "vhost/internal.h"

#define NO_INTERRUPT 1u
#define NO_NOTIFY 1u

static uint16_t load(const uint16_t *word)
{
    return le16toh(__atomic_load_n(word, __ATOMIC_ACQUIRE));
}

static void store(uint16_t *word, uint16_t value)
{
    __atomic_store_n(word, htole16(value), __ATOMIC_RELEASE);
}

bool vhost_vring_open(struct vhost_vring *vring, const struct vhost_memory *memory, const tapfs_vhost_ring *ring)
{
    uint32_t entries = ring->entries;

    if (entries == 0 || entries > TAPFS_VHOST_ENTRIES_MAX || (entries & (entries - 1)) != 0) {
        return false;
    }
    uint64_t words = ring->event_index ? 3 : 2;
    const void *descriptors = vhost_user_memory(memory, ring->descriptors, entries * sizeof(struct vring_descriptor),
                                                _Alignof(struct vring_descriptor));
    const void *available =
        vhost_user_memory(memory, ring->available, (entries + words) * sizeof(uint16_t), sizeof(uint16_t));
    void *used = vhost_user_memory(memory, ring->used,
                                   words * sizeof(uint16_t) + entries * sizeof(struct vring_used_entry),
                                   _Alignof(struct vring_used_entry));
    if (descriptors == NULL || available == NULL || used == NULL) {
        return false;
    }
    *vring = (struct vhost_vring){
        .descriptors = descriptors,
        .available = available,
        .used = used,
        .entries = entries,
        .event_index = ring->event_index != 0,
    };
    vring->used_entries = (struct vring_used_entry *)(void *)(vring->used + 2);
    vring->available_event = (uint16_t *)(void *)(vring->used_entries + entries);
    vring->answered = vring->published = load(&vring->used[1]);
    vring->taken = (uint16_t)ring->base;
    return true;
}

uint32_t vhost_vring_waiting(const struct vhost_vring *vring)
{
    return (uint16_t)(load(&vring->available[1]) - vring->taken);
}

uint16_t vhost_vring_take(struct vhost_vring *vring)
{
    return load(&vring->available[2 + vring->taken++ % vring->entries]);
}

void vhost_vring_ask(struct vhost_vring *vring)
{
    if (vring->event_index) {
        store(vring->available_event, vring->taken);
    } else {
        store(&vring->used[0], 0);
    }
    /* Before the next look at the available ring: who adds something either sees this or is seen. */
    atomic_thread_fence(memory_order_seq_cst);
}

void vhost_vring_ask_not(struct vhost_vring *vring)
{
    /* With an event index the one that was said stays behind what is added. */
    if (!vring->event_index) {
        store(&vring->used[0], NO_NOTIFY);
    }
}

uint64_t vhost_vring_used_bytes(const struct vhost_vring *vring)
{
    return (vring->event_index ? 3 : 2) * sizeof(uint16_t) + vring->entries * sizeof(struct vring_used_entry);
}

void vhost_vring_answer(struct vhost_vring *vring, uint16_t head, uint32_t written)
{
    vring->used_entries[vring->answered++ % vring->entries] =
        (struct vring_used_entry){.id = htole32(head), .length = htole32(written)};
}

bool vhost_vring_publish(struct vhost_vring *vring)
{
    uint16_t old = vring->published, new = vring->answered;

    store(&vring->used[1], new);
    vring->published = new;
    /* Before the look at what the guest wants: it either sees the answers or is notified. */
    atomic_thread_fence(memory_order_seq_cst);
    if (!vring->notified) {
        vring->notified = true;
        return true;
    }
    if (vring->event_index) {
        uint16_t event = load(&vring->available[2 + vring->entries]);
        return (uint16_t)(new - event - 1) < (uint16_t)(new - old);
    }
    return (load(&vring->available[0]) & NO_INTERRUPT) == 0;
}
