"""From other trainers' configurations to ours: `jaxrl convert-config`."""
