"""Models on meshes: policy, actor, reference, critic, reward model."""
