// Counts the bytes that a kernel reads, by array.
//
// The kernel is compiled for a thread sanitizer, and linked with these functions in its place.

#include <stddef.h>
#include <vector>

namespace {

struct Region {
    const unsigned char* begin;
    size_t size;
    unsigned long long* bytes;  // read from it so far
};

std::vector<Region> regions;

void count(const void* address, size_t size) {
    for (const Region& region : regions)
        if (static_cast<size_t>(static_cast<const unsigned char*>(address) - region.begin) <
            region.size) {
            *region.bytes += size;
            return;
        }
}

}  // namespace

extern "C" {

void emulator_count(size_t size, const void** begins, const size_t* sizes,
                    unsigned long long* bytes) {
    regions.clear();
    for (size_t i = 0; i < size; i++)
        regions.push_back({static_cast<const unsigned char*>(begins[i]), sizes[i], bytes + i});
}

#define READ(size) \
    void __tsan_read##size(void* address) { count(address, size); } \
    void __tsan_unaligned_read##size(void* address) { count(address, size); } \
    void __tsan_volatile_read##size(void* address) { count(address, size); } \
    void __tsan_write##size(void*) {} \
    void __tsan_unaligned_write##size(void*) {} \
    void __tsan_volatile_write##size(void*) {}
READ(1) READ(2) READ(4) READ(8) READ(16)

#define ATOMIC_ADD(bits, type) \
    type __tsan_atomic##bits##_fetch_add(volatile type* address, type value, int) { \
        count(const_cast<type*>(address), sizeof(type)); \
        return __atomic_fetch_add(address, value, __ATOMIC_RELAXED); \
    }
ATOMIC_ADD(32, unsigned) ATOMIC_ADD(64, unsigned long long)

void __tsan_read_range(void* address, size_t size) { count(address, size); }
void __tsan_write_range(void*, size_t) {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}

}
