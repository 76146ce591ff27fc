// Reads the few fields that are needed of serialised protocol buffers.

#ifndef COMPILE_ONLY_TPU_PROTOBUF_H_
#define COMPILE_ONLY_TPU_PROTOBUF_H_

#include <cstdint>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace protobuf {

struct Field {
  int number;
  uint64_t value = 0;      // of an integer
  std::string_view bytes;  // of a string, a message or a packed list
};

inline uint64_t take_varint(std::string_view& bytes) {
  uint64_t value = 0;
  for (int shift = 0; shift < 64; shift += 7) {
    if (bytes.empty()) break;
    const uint8_t byte = bytes.front();
    bytes.remove_prefix(1);
    value |= uint64_t{byte & 0x7fu} << shift;
    if (byte < 0x80) return value;
  }
  throw std::runtime_error("a protocol buffer ends within a number");
}

inline std::string_view take(std::string_view& bytes, size_t size) {
  if (size > bytes.size()) {
    throw std::runtime_error("a protocol buffer ends within a field");
  }
  const std::string_view taken = bytes.substr(0, size);
  bytes.remove_prefix(size);
  return taken;
}

// The fields of a message, in their order.
inline std::vector<Field> fields(std::string_view message) {
  std::vector<Field> all;
  while (!message.empty()) {
    const uint64_t key = take_varint(message);
    Field field;
    field.number = static_cast<int>(key >> 3);
    switch (key & 7) {
      case 0:
        field.value = take_varint(message);
        break;
      case 1:
        field.bytes = take(message, 8);
        break;
      case 2:
        field.bytes = take(message, take_varint(message));
        break;
      case 5:
        field.bytes = take(message, 4);
        break;
      default:
        throw std::runtime_error("a protocol buffer has a field of an unknown kind");
    }
    all.push_back(field);
  }
  return all;
}

// The last message or string with this number, or an empty one.
inline std::string_view bytes_of(std::string_view message, int number) {
  std::string_view found;
  for (const Field& field : fields(message)) {
    if (field.number == number) found = field.bytes;
  }
  return found;
}

inline std::vector<std::string_view> messages_of(std::string_view message, int number) {
  std::vector<std::string_view> found;
  for (const Field& field : fields(message)) {
    if (field.number == number) found.push_back(field.bytes);
  }
  return found;
}

inline int64_t integer_of(std::string_view message, int number) {
  uint64_t found = 0;
  for (const Field& field : fields(message)) {
    if (field.number == number) found = field.value;
  }
  return static_cast<int64_t>(found);
}

// A repeated integer, packed or not.
inline std::vector<int64_t> integers_of(std::string_view message, int number) {
  std::vector<int64_t> found;
  for (const Field& field : fields(message)) {
    if (field.number != number) continue;
    if (field.bytes.data() == nullptr) {
      found.push_back(static_cast<int64_t>(field.value));
    }
    std::string_view packed = field.bytes;
    while (!packed.empty()) {
      found.push_back(static_cast<int64_t>(take_varint(packed)));
    }
  }
  return found;
}

}  // namespace protobuf

#endif  // COMPILE_ONLY_TPU_PROTOBUF_H_
