/* The face of a library of ciphers, for cipher.c. */
#ifndef TAPFS_ENGINE_CIPHER_H
#define TAPFS_ENGINE_CIPHER_H

#include "engine/internal.h"

/* Room for the IV of a sector. A cipher with shorter blocks takes the first bytes. */
#define CIPHER_IV_BYTES 16

struct cipher_library {
    /* Whether it has an algorithm in a mode, with keys of so many bytes. */
    bool (*has)(uint32_t algorithm, uint32_t mode, size_t key_bytes);
    /* One that it has, with its key; NULL without memory. For any number of threads at once. */
    void *(*open)(uint32_t algorithm, uint32_t mode, const uint8_t *key, size_t key_bytes);
    /* Wipes the key; NULL is allowed. */
    void (*close)(void *cipher);
    /* `count` sectors of `bytes` each, in place, with an IV each, which it may change; none for ECB. 0 or an errno. */
    int (*apply)(void *cipher, bool encrypt, uint8_t *buffer, uint32_t bytes, uint8_t (*ivs)[CIPHER_IV_BYTES],
                 size_t count);
};

/* engine/cipher_openssl.c: AES. */
TAPFS_INTERNAL extern const struct cipher_library openssl_ciphers;
/* engine/cipher_nettle.c: the others, and AES where libcrypto has not the mode; only once the library is open. */
TAPFS_INTERNAL extern const struct cipher_library nettle_ciphers;

#endif
