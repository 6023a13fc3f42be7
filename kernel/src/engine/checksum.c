/* CRC-32C by the processor's instruction, for metadata that drivers sum (tapfs/checksums.py has it in Python). */
#include <string.h>

#include "engine/bytes.h"

#if defined(__x86_64__)

int tapfs_has_crc32c(void)
{
    return __builtin_cpu_supports("sse4.2") != 0;
}

__attribute__((target("sse4.2,crc32"))) uint32_t tapfs_crc32c(const void *buffer, uint64_t length)
{
    const unsigned char *bytes = buffer;
    uint64_t value = UINT32_MAX;

    for (; length >= sizeof(uint64_t); length -= sizeof(uint64_t), bytes += sizeof(uint64_t)) {
        uint64_t word;
        memcpy(&word, bytes, sizeof word);
        value = __builtin_ia32_crc32di(value, word);
    }
    for (; length > 0; length--, bytes++) {
        value = __builtin_ia32_crc32qi((uint32_t)value, *bytes);
    }
    return ~(uint32_t)value;
}

#else

int tapfs_has_crc32c(void)
{
    return 0;
}

uint32_t tapfs_crc32c(const void *buffer, uint64_t length)
{
    (void)buffer;
    (void)length;
    return 0;
}

#endif
