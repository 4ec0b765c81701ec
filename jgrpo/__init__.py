"""Group Relative Policy Optimization of Granite Speech with a text metric as the reward, in JAX."""
