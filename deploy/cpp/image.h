// Decodes image files, as step3_infer.py does. Include it once: it defines stb_image's functions.

#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "exif.h"
#include "formats.h"
#include "problem.h"
#include "text.h"

using std::string;

constexpr int64_t MAX_SIDE = 65535;        // pixels; the limit of JPEG
constexpr int64_t MAX_PIXELS = 178956970;  // Pillow's limit; --max-pixels changes it
constexpr int MAX_SCANS = 200;             // of a JPEG, each of which takes as long as an image

// ------------------------------------------------------------------------------------- memory

// What stb_image may allocate for an image. A file may inflate to any size, whatever it says about
// its pixels; the largest honest one is a PNG of RGBA in 16 bits that cannot be compressed.
constexpr size_t BYTES_PER_PIXEL = 32;
constexpr size_t BYTES_PER_IMAGE = size_t(64) << 20;

// Allocates for stb_image, and refuses what is over the budget.
class Budget {
  // Its size is in front of each block, at the distance that keeps blocks aligned.
  static constexpr size_t FRONT = alignof(std::max_align_t);
  static_assert(FRONT >= sizeof(size_t));

  size_t left = 0;

 public:
  // Since the last start(): whether something was over the budget, or more than the machine had.
  bool exceeded = false;
  bool out_of_memory = false;

  void start(size_t bytes) {
    left = bytes;
    exceeded = false;
    out_of_memory = false;
  }

  void* allocate(size_t size) { return reallocate(nullptr, size); }

  // As std::realloc.
  void* reallocate(void* block, size_t size) {
    char* const old = block ? static_cast<char*>(block) - FRONT : nullptr;
    const size_t old_size = old ? *reinterpret_cast<size_t*>(old) : 0;
    if (size > left + old_size) {
      exceeded = true;
      return nullptr;
    }

    auto* const grown = static_cast<char*>(std::realloc(old, size + FRONT));
    if (!grown) {
      out_of_memory = true;
      return nullptr;
    }

    *reinterpret_cast<size_t*>(grown) = size;
    left += old_size;
    left -= size;
    return grown + FRONT;
  }

  void release(void* block) {
    if (!block) return;

    char* const start = static_cast<char*>(block) - FRONT;
    left += *reinterpret_cast<size_t*>(start);
    std::free(start);
  }
};

inline Budget budget;  // one image is decoded at a time

#define STB_IMAGE_IMPLEMENTATION
#define STB_IMAGE_STATIC
#define STBI_ONLY_PNG
#define STBI_ONLY_JPEG
#define STBI_ONLY_BMP
#define STBI_ONLY_GIF
#define STBI_MALLOC(size) budget.allocate(size)
#define STBI_REALLOC(block, size) budget.reallocate(block, size)
#define STBI_FREE(block) budget.release(block)
#include <stb_image.h>

// ------------------------------------------------------------------------------------- images

struct Image {
  int height;
  int width;
  std::vector<uint8_t> pixels;  // [height, width, channels]
  bool is_transparent = false;  // whether the file has pixels that are not opaque
};

// What stb_image reads from. It reads zeros beyond the end, so `ended` records whether it read that
// far.
struct Source {
  const string& bytes;
  size_t at = 0;
  bool ended = false;
};

inline const stbi_io_callbacks READER = {
    [](void* user, char* data, int size) {
      auto& source = *static_cast<Source*>(user);
      const size_t count = source.bytes.copy(data, size, source.at);
      source.ended = source.ended || count == 0;
      source.at += count;
      return int(count);
    },
    [](void* user, int count) {
      auto& source = *static_cast<Source*>(user);
      source.at = std::min(source.at + count, source.bytes.size());
    },
    [](void* user) {
      const auto& source = *static_cast<Source*>(user);
      return int(source.at == source.bytes.size());
    }};

// Pixels of `components` bytes (grey, grey + alpha, RGB, RGB + alpha) -> upright Image of 1 or 3
// channels; orientation: that of EXIF.
inline Image upright(const uint8_t* pixels, int height, int width, int components, int channels,
                     int orientation) {
  const bool swap = orientation >= 5;
  const bool from_below =
      orientation == 3 || orientation == 4 || orientation == 6 || orientation == 7;
  const bool from_right =
      orientation == 2 || orientation == 3 || orientation == 7 || orientation == 8;

  Image image;
  image.height = swap ? width : height;
  image.width = swap ? height : width;
  image.pixels.resize(size_t(height) * width * channels);
  uint8_t* out = image.pixels.data();
  const int step = components < 3 ? 0 : 1;  // red, green and blue of a grey pixel are the same byte
  for (int y = 0; y < image.height; y++) {
    for (int x = 0; x < image.width; x++) {
      size_t row = swap ? x : y;
      size_t column = swap ? y : x;
      if (from_below) row = height - 1 - row;
      if (from_right) column = width - 1 - column;

      const uint8_t* p = pixels + (row * width + column) * components;
      if (channels == 3) {
        for (int k = 0; k < 3; k++) out[k] = p[k * step];
      } else {  // ITU-R 601-2 luma in Pillow's fixed point
        *out = (19595 * p[0] + 38470 * p[step] + 7471 * p[2 * step] + 0x8000) >> 16;
      }
      out += channels;
    }
  }
  return image;
}

// Throws Problem for an image that is too large, or that takes too long to decode.
inline void check_limits(const string& bytes, int64_t width, int64_t height, int64_t max_pixels) {
  const int64_t side = std::max(width, height);
  if (side > MAX_SIDE)
    throw Problem("has a side of " + grouped(side) + " pixels, more than " + grouped(MAX_SIDE));
  if (width * height > max_pixels)
    throw Problem("has " + grouped(width) + " x " + grouped(height) +
                  " pixels, more than --max-pixels " + grouped(max_pixels));

  if (bytes.compare(0, 2, "\xFF\xD8") != 0) return;
  // In the data of a scan, 0xFF is followed by 0 or a restart marker only.
  int scans = 0;
  size_t at = 0;
  while ((at = bytes.find("\xFF\xDA", at)) != string::npos) {
    scans++;
    at += 2;
  }
  if (scans > MAX_SCANS)
    throw Problem("is a JPEG of " + grouped(scans) + " scans, more than " + grouped(MAX_SCANS) +
                  ": save it anew");
}

// Why stb_image could not decode a file. It does not always say itself that memory was lacking.
inline string failure() {
  if (budget.exceeded) return "is corrupt: it takes more memory than an image of its size";
  if (budget.out_of_memory) return "is too large for this machine's memory";
  return string("is corrupt or truncated: ") + stbi_failure_reason();
}

// Why stb_image does not know the header of a file.
inline string unknown_header(const string& bytes) {
  const string format = format_of(bytes);
  if (format.empty()) return "is not a PNG, JPEG, BMP or GIF image";
  if (format == "PNG" || format == "JPEG" || format == "BMP" || format == "GIF")
    return "is a damaged " + format + " file, or one of a kind that stb_image cannot read (" +
           stbi_failure_reason() + "): save it as an ordinary PNG";
  return "is a file in the format " + format + ", which this program cannot read: save it as PNG";
}

// What the first bytes of an image file say.
struct Header {
  int width = 0;
  int height = 0;
  bool is_wide = false;  // whether it has 16 bits for each colour
};

// Throws Problem for what stb_image cannot read, or what is over the limits.
inline Header read_header(const string& bytes, int64_t max_pixels) {
  budget.start(BYTES_PER_IMAGE);

  Header header;
  int components = 0;
  Source source{bytes};
  const bool is_known = stbi_info_from_callbacks(&READER, &source, &header.width, &header.height,
                                                 &components);
  if (!is_known || header.width < 1 || header.height < 1) throw Problem(unknown_header(bytes));
  check_limits(bytes, header.width, header.height, max_pixels);

  Source again{bytes};
  header.is_wide = stbi_is_16_bit_from_callbacks(&READER, &again);
  return header;
}

// Scales `count` pixels of 16 bits in place to 8 bits: `white` of a colour becomes 255, and 65535
// of the alpha, which is the last of 2 or 4 components.
inline void scale_to_8_bits(void* pixels, size_t count, int components, uint32_t white) {
  const auto* wide = static_cast<const uint16_t*>(pixels);
  auto* scaled = static_cast<uint8_t*>(pixels);
  const size_t alpha = components % 2 ? components : components - 1;
  for (size_t k = 0; k < count * components; k++) {
    const uint32_t full = k % components == alpha ? 65535 : white;
    scaled[k] = (std::min<uint32_t>(wide[k], full) * 255 + full / 2) / full;
  }
}

// Whether the alpha that stb_image gives is transparency. That of a BMP is a byte without a meaning
// unless its header says where the alpha is.
inline bool has_transparency(const string& bytes, int components) {
  if (components % 2) return false;
  if (format_of(bytes) != "BMP") return true;

  const Numbers number{bytes};
  const size_t bits = number(28, 2, true);
  const size_t compression = number(30, 4, true);
  return bits == 32 && compression == 3;  // BI_BITFIELDS
}

// Whether one of `count` pixels is not opaque; their alpha is the last of 2 or 4 components.
inline bool is_any_transparent(const uint8_t* pixels, size_t count, int components) {
  for (size_t k = 1; k <= count; k++)
    if (pixels[k * components - 1] < 255) return true;
  return false;
}

// Whether the alpha of all of `count` pixels is 0, as in a BMP of a program that leaves it unused.
inline bool is_alpha_empty(const uint8_t* pixels, size_t count, int components) {
  for (size_t k = 1; k <= count; k++)
    if (pixels[k * components - 1] > 0) return false;
  return true;
}

// Lays `count` pixels over a ground of this grey level, in place; their alpha is the last of 2 or 4
// components.
inline void composite(uint8_t* pixels, size_t count, int components, int ground) {
  const int colours = components - 1;
  for (uint8_t* p = pixels; p < pixels + count * components; p += components) {
    const int alpha = p[colours];
    for (int k = 0; k < colours; k++) p[k] = (p[k] * alpha + ground * (255 - alpha) + 127) / 255;
  }
}

// The bytes of an image file -> Image; channels is 1 (grey) or 3 (RGB). white: the level of 16-bit
// pixels that becomes 255. ground: the grey level under transparent pixels; without one, the alpha
// is dropped. Throws Problem with the reason (the caller knows the name), std::bad_alloc.
inline Image decode(const string& bytes, int channels, uint32_t white, std::optional<int> ground,
                    int64_t max_pixels) {
  if (bytes.empty()) throw Problem("is empty");
  const Header header = read_header(bytes, max_pixels);
  const size_t count = size_t(header.width) * header.height;
  budget.start(BYTES_PER_IMAGE + BYTES_PER_PIXEL * count);

  Source source{bytes};
  int width = 0;
  int height = 0;
  int components = 0;
  void* pixels = nullptr;
  if (header.is_wide)
    pixels = stbi_load_16_from_callbacks(&READER, &source, &width, &height, &components, 0);
  else
    pixels = stbi_load_from_callbacks(&READER, &source, &width, &height, &components, 0);

  const std::unique_ptr<void, decltype(&stbi_image_free)> owner(pixels, stbi_image_free);
  if (!pixels) throw Problem(failure());
  if (source.ended) throw Problem("is truncated");
  if (width != header.width || height != header.height)
    throw Problem("is corrupt: it has two sizes");

  if (header.is_wide) scale_to_8_bits(pixels, count, components, white);
  auto* narrow = static_cast<uint8_t*>(pixels);
  bool is_transparent =
      has_transparency(bytes, components) && is_any_transparent(narrow, count, components);
  if (is_transparent && format_of(bytes) == "BMP")
    is_transparent = !is_alpha_empty(narrow, count, components);
  if (is_transparent && ground) composite(narrow, count, components, *ground);

  Image image = upright(narrow, height, width, components, channels, orientation_of(bytes));
  image.is_transparent = is_transparent;
  return image;
}
