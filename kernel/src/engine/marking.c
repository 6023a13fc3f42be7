/* Mark the units of a host file that the words of tables name, for checks (tapfs/marking.py has it in Python). */
#include <endian.h>
#include <string.h>

#include "engine/bytes.h"

int64_t tapfs_mark_units(const void *words, uint64_t count, unsigned unit_bits, uint8_t *marks, uint64_t units,
                         uint64_t *greatest)
{
    const unsigned char *bytes = words;
    uint64_t inside = ((uint64_t)1 << unit_bits) - 1;
    int64_t used = 0;

    *greatest = 0;
    for (uint64_t i = 0; i < count; i++, bytes += sizeof(uint64_t)) {
        uint64_t word;
        memcpy(&word, bytes, sizeof word);
        if (word == 0) {
            continue;
        }
        word = be64toh(word);
        if ((word & inside) != 0 || word >> unit_bits >= units) {
            return -1;
        }
        marks[word >> unit_bits] = 1;
        *greatest = word > *greatest ? word : *greatest;
        used++;
    }
    return used;
}
