;; A small operator: what `process` does depends on the number of the input.
;;
;; What the component model reads of memory lies at fixed addresses:
;;   1024 zeros: an empty description, and the success of whatever gives nothing back
;;   1536 an empty hand-over, which is the last
;;   2048 what a batch gives: one emission (3072) of one record (4096): the count in a global and in memory
;;   5120 the error of input 6, 5184 that of input 7
(module
  (import "cofferdam:operator/logging@0.2.0" "log" (func $log (param i32 i32 i32)))
  (import "cofferdam:operator/logging@0.2.0" "panicked" (func $panicked (param i32 i32)))
  (import "cofferdam:operator/metrics@0.2.0" "add" (func $add (param i32 i32 i64)))
  (import "cofferdam:operator/metrics@0.2.0" "set" (func $set (param i32 i32 f64)))
  (import "cofferdam:operator/clock@0.2.0" "now" (func $now (result i64)))
  (import "cofferdam:operator/random@0.2.0" "next" (func $next (result i64)))
  (import "cofferdam:operator/state@0.2.0" "get" (func $get (param i32 i32 i32 i32 i32)))
  (import "cofferdam:operator/task@0.2.0" "attempt" (func $attempt (result i32)))

  (memory (export "memory") 4)
  (global $count (mut i64) (i64.const 0))
  (global $free (mut i32) (i32.const 131072))
  (table $functions 8 funcref)

  (data (i32.const 1596) "\01")
  (data (i32.const 2052) "\00\0c\00\00\01\00\00\00")
  (data (i32.const 3092) "\00\10\00\00\10\00\00\00\20\10\00\00\01\00\00\00")
  (data (i32.const 4128) "\10")
  ;; Another verdict on record 0: its class, its message, its record.
  (data (i32.const 5120) "\01\00\00\00\00\00\00\00\00\18\00\00\07\00\00\00\01\00\00\00\00\00\00\00")
  (data (i32.const 5184) "\01\00\00\00\01\00\00\00\10\18\00\00\02\00\00\00\00\00\00\00\00\00\00\00")
  (data (i32.const 6144) "no good")
  (data (i32.const 6160) "\ff\ff")
  (data (i32.const 6176) "one too many")

  (func (export "cabi_realloc") (param i32 i32 i32 i32) (result i32)
    (local $at i32)
    (local.set $at (i32.and (i32.add (global.get $free) (i32.const 15)) (i32.const -16)))
    (global.set $free (i32.add (local.get $at) (local.get 3)))
    (local.get $at))

  (func $recurse (param i64) (result i64)
    (i64.add (i64.const 1) (call $recurse (i64.add (local.get 0) (i64.const 1)))))

  (func $count_up
    (global.set $count (i64.add (global.get $count) (i64.const 1)))
    (i64.store (i32.const 70000) (i64.add (i64.load (i32.const 70000)) (i64.const 1)))
    (i64.store (i32.const 4096) (global.get $count))
    (i64.store (i32.const 4104) (i64.load (i32.const 70000))))

  (func $ask_the_host
    (call $log (i32.const 3) (i32.const 6144) (i32.const 7))
    (call $add (i32.const 6144) (i32.const 2) (i64.const 5))
    (call $set (i32.const 6144) (i32.const 7) (f64.const 0.5))
    (i64.store (i32.const 4096) (i64.add (call $now) (call $next)))
    (i64.store (i32.const 4104) (i64.extend_i32_u (call $attempt))))

  (func (export "cofferdam:operator/guest@0.2.0#describe") (result i32) (i32.const 1024))
  (func (export "cofferdam:operator/guest@0.2.0#open")
    (param i32 i32 i32 i32 i32 i32 i32 i32 i64 i32) (result i32) (i32.const 1024))

  (func (export "cofferdam:operator/guest@0.2.0#process")
    (param $input i32) (param i32 i32 i32 i32 i32 i32 i32 i32 i32 i32) (result i32)
    (block $bad_pointer (block $asks_for_state (block $many (block $asks
    (block $not_text (block $rejects (block $table (block $recursion (block $grows (block $spins
    (block $traps (block $counts
      (br_table $counts $traps $spins $grows $recursion $table $rejects $not_text $asks $many
        $asks_for_state $bad_pointer (local.get $input)))
      (call $count_up)
      (return (i32.const 2048)))
      (call $panicked (i32.const 6176) (i32.const 12))
      unreachable)
      (loop $again (br $again)))
      (loop $again (br_if $again (i32.ne (memory.grow (i32.const 1)) (i32.const -1))))
      unreachable)
      (drop (call $recurse (i64.const 0)))
      unreachable)
      ;; The call of an element that no function is in.
      (call_indirect $functions (i32.const 3))
      unreachable)
      (return (i32.const 5120)))
      (return (i32.const 5184)))
      (call $ask_the_host)
      (return (i32.const 2048)))
      ;; A value of 64 KiB, where there is room for 16 bytes.
      (i32.store (i32.const 3096) (i32.const 65536))
      (i32.store (i32.const 4128) (i32.const 65536))
      (return (i32.const 2048)))
      (call $get (i32.const 0) (i32.const 6144) (i32.const 7) (i32.const 0) (i32.const 8192))
      (return (i32.const 2048)))
    (i32.const 0x7fffff00))

  (func (export "cofferdam:operator/guest@0.2.0#advance") (param i64) (result i32) (i32.const 1024))
  (func (export "cofferdam:operator/guest@0.2.0#checkpoint") (param i64 i32 i32) (result i32) (i32.const 1536))
  (func (export "cofferdam:operator/guest@0.2.0#restore")
    (param i32 i32 i32 i32 i32 i32 i32 i32 i32 i32 i32 i32 i32 i32 i32 i32) (result i32) (i32.const 1024))
  (func (export "cofferdam:operator/guest@0.2.0#converts") (param i32 i32 i32) (result i32) (i32.const 1024))
  (func (export "cofferdam:operator/guest@0.2.0#finish") (result i32) (i32.const 1024))
  (func (export "cofferdam:operator/guest@0.2.0#close")))
