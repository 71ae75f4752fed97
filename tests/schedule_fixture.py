"""A scheduled program in small, as the TPU compiler writes it."""

# A program with a loop of 32 trips, in it a kernel, one asynchronous all-gather that is seen three
# times, and an all-reduce of two arrays. The kernel's text holds lines that begin with "}}".
HLO = """\
HloModule jit_train_step, is_scheduled=true, entry_computation_layout={(f32[8]{0})->f32[8]{0}}

%add (x: f32[], y: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%x, %y)
}

%gathering (p0: bf16[16,128]) -> bf16[4096,128] {
  %p0 = bf16[16,128]{1,0} parameter(0)
  ROOT %all-gather.1 = bf16[4096,128]{1,0} all-gather(%p0), channel_id=3, \
replica_groups=mesh['a'=1,'b'=256] {'b'}, dimensions={0}
}

%gathering.done (p0: bf16[16,128]) -> bf16[4096,128] {
  ROOT %all-gather.2 = bf16[4096,128]{1,0} all-gather(%p0), channel_id=3, \
replica_groups=mesh['a'=1,'b'=256] {'b'}, dimensions={0}
}

%inner (p0: bf16[8]) -> bf16[8] {
  ROOT %product = bf16[8]{0} multiply(%p0, %p0), \
backend_config={"window_config":{"estimated_cycles":"999999"}}
}

%condition (state: (s32[], f32[8])) -> pred[] {
  %limit = s32[]{:T(128)} constant(32)
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

%body (state: (s32[], f32[8])) -> (s32[], f32[8]) {
  %async-collective-start = (bf16[4096,128]{1,0}, s32[]) fusion(%w), kind=kCustom, calls=%gathering
  %fusion.1 = bf16[8]{0} fusion(%x), kind=kOutput, calls=%inner, \
backend_config={"window_config":{"estimated_cycles":"1000"}}
  %splash_mha_fwd_segmented_residuals.3 = (f32[512,128]{1,0}, bf16[32,4096,128]{2,1,0}) \
custom-call(%q, %k), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 512, \\"block_kv\\": 512}"
}}, metadata={op_name="jit(f)/splash_mha_fwd_segmented_residuals/pallas_call"}
  %fusion.2 = f32[32,128]{1,0} fusion(%z), frontend_attributes={kernel_metadata={
"xprof_metadata":"{}"
}}, kind=kLoop, calls=%inner, backend_config={"window_config":{"estimated_cycles":"30"}}
  %async-collective-done = bf16[4096,128]{1,0} \
fusion(%async-collective-start), kind=kCustom, calls=%gathering.done
  %all-reduce.7 = (bf16[1024,8]{1,0}, bf16[1024,24]{1,0}) all-reduce(%g, %h), channel_id=9, \
replica_groups=[1,256]<=[256], to_apply=%add
  ROOT %next = (s32[], f32[8]) tuple(%i, %y)
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %copy.1 = f32[8]{0} copy(%p), backend_config={"window_config":{"estimated_cycles":"70"}}
  %while.1 = (s32[], f32[8]) while(%start), condition=%condition, body=%body
  ROOT %out = f32[8]{0} get-tuple-element(%while.1), index=1
}
"""
